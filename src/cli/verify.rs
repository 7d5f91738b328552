//! `posthoc-ema verify`.

use posthoc_ema::{Run, snapshot};

use super::args::Verify;
use super::output::{byte_bar, bytes, print, print_json};
use super::{Failure, Outcome};

/// Reads every file of a run and compares its checksum.
pub fn run(arguments: &Verify) -> Outcome {
    let run = Run::open(&arguments.run)?;
    let files: Vec<_> = run.snapshots().iter().flat_map(|snapshot| snapshot.files()).collect();
    let state = arguments.run.join(snapshot::STATE_FILE);
    let state = state.exists().then(|| snapshot::StoredFile::open(&state));
    let bar = byte_bar(files.iter().map(|file| file.len()).sum(), "verifying");
    let mut damaged: Vec<String> = Vec::new();
    let mut total = 0;
    for file in &files {
        damaged.extend(file.verify().err().map(|error| error.to_string()));
        total += file.len();
        bar.inc(file.len());
    }
    if let Some(state) = &state {
        let checked = state.as_ref().map_err(ToString::to_string).and_then(|f| f.verify().map_err(|e| e.to_string()));
        damaged.extend(checked.err());
    }
    bar.finish_and_clear();
    let count = files.len() + usize::from(state.is_some());
    if arguments.json {
        print_json(&serde_json::json!({ "files": count, "snapshot_bytes": total, "damaged": damaged }));
    } else {
        damaged.iter().for_each(|line| print(line));
        print(&format!("{count} files checked ({} of snapshots), {} damaged", bytes(total), damaged.len()));
    }
    if damaged.is_empty() {
        return Ok(());
    }
    Err(Failure::Unhealthy(format!("{} of {count} files are damaged", damaged.len())))
}
