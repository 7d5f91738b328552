//! `posthoc-ema verify`.

use std::path::{Path, PathBuf};

use posthoc_ema::Run;
use posthoc_ema::snapshot::{self, STATE_FILE, Snapshot, StoredFile};

use super::args::Verify;
use super::output::{byte_bar, bytes, print, print_json};
use super::{Failure, Outcome};

/// Reads every file of a run, compares its checksum, and checks that the snapshots belong together. What is damaged does
/// not keep the rest from being read.
pub fn run(arguments: &Verify) -> Outcome {
    let mut trouble = Vec::new();
    let (mut paths, mut sound) = (Vec::new(), true);
    for (stem, files) in snapshot::list_each(&arguments.run)? {
        let opened = files.and_then(|files| {
            paths.extend(files.iter().cloned());
            Snapshot::open(stem, &files)
        });
        sound &= opened.is_ok();
        trouble.extend(opened.err().map(|error| error.to_string()));
    }
    if sound {
        trouble.extend(Run::open(&arguments.run).err().map(|error| error.to_string()));
    }
    paths.push(arguments.run.join(STATE_FILE));
    paths.retain(|path| path.exists());
    let total = check(&paths, &mut trouble);
    if arguments.json {
        print_json(&serde_json::json!({ "files": paths.len(), "bytes": total, "damaged": trouble }));
    } else {
        trouble.iter().for_each(|line| print(line));
        print(&format!("{} files read ({}), {} findings", paths.len(), bytes(total), trouble.len()));
    }
    if trouble.is_empty() {
        return Ok(());
    }
    Err(Failure::Unhealthy(format!("{}: {} findings", arguments.run.display(), trouble.len())))
}

/// Reads files and adds what is wrong with them; returns how many bytes were read.
fn check(paths: &[PathBuf], trouble: &mut Vec<String>) -> u64 {
    let size = |path: &Path| path.metadata().map_or(0, |metadata| metadata.len());
    let bar = byte_bar(paths.iter().map(|path| size(path)).sum(), "verifying");
    let mut total = 0;
    for path in paths {
        match StoredFile::open(path) {
            Ok(file) => {
                trouble.extend(file.verify().err().map(|error| error.to_string()));
                total += file.len();
            }
            // A snapshot's file that does not open was reported with its snapshot.
            Err(error) if path.ends_with(STATE_FILE) => trouble.push(error.to_string()),
            Err(_) => {}
        }
        bar.inc(size(path));
    }
    bar.finish_and_clear();
    total
}
