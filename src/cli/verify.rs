//! `posthoc-ema verify`.

use std::path::{Path, PathBuf};

use clap::Args;
use posthoc_ema::snapshot::{self, Snapshot, StoredFile};
use posthoc_ema::{Error, Run};

use super::output::{byte_bar, bytes, print, print_json};
use super::{Failure, Outcome};

/// Read every file of a run and check its checksum
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    pub run: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Reads every file of a run, compares its checksum, and checks that the snapshots belong together. What is damaged does
/// not keep the rest from being read.
pub fn run(arguments: &Arguments) -> Outcome {
    let mut findings = Findings::default();
    for (stem, files) in snapshot::list_each(&arguments.run)? {
        findings.add(files.and_then(|files| Snapshot::open(stem, &files)));
    }
    if findings.0.is_empty() {
        findings.add(Run::open(&arguments.run));
    }
    let paths = files(&arguments.run)?;
    let total = check(&paths, &mut findings);
    let findings = findings.0;
    if arguments.json {
        print_json(&serde_json::json!({ "files": paths.len(), "bytes": total, "damaged": findings }));
    } else {
        findings.iter().for_each(|line| print(line));
        print(&format!("{} files ({} read), {} findings", paths.len(), bytes(total), findings.len()));
    }
    if findings.is_empty() {
        return Ok(());
    }
    Err(Failure::Unhealthy(format!("{}: {} findings", arguments.run.display(), findings.len())))
}

/// What is wrong, each thing once.
#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    /// A file that is gone was dropped by a tracker since the listing: that is no damage.
    fn add<T>(&mut self, result: Result<T, Error>) {
        let Err(error) = result else { return };
        let gone = matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
        let text = error.to_string();
        if !gone && !self.0.contains(&text) {
            self.0.push(text);
        }
    }
}

/// Every safetensors file of the run: shards of sets that are not whole are among them.
fn files(run: &Path) -> Result<Vec<PathBuf>, Error> {
    let io = |source| Error::Io { action: "list", path: run.to_owned(), source };
    let entries: Vec<_> = std::fs::read_dir(run).map_err(io)?.collect::<Result<_, _>>().map_err(io)?;
    let paths = entries.into_iter().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    paths.retain(|path| !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")));
    paths.sort();
    Ok(paths)
}

/// Reads files and notes what is wrong with them; returns how many bytes were read.
fn check(paths: &[PathBuf], findings: &mut Findings) -> u64 {
    let size = |path: &Path| path.metadata().map_or(0, |metadata| metadata.len());
    let bar = byte_bar(paths.iter().map(|path| size(path)).sum(), "verifying");
    let mut total = 0;
    for path in paths {
        let verified = StoredFile::open(path).and_then(|file| file.verify().map(|()| file.len()));
        total += verified.as_ref().copied().unwrap_or(0);
        findings.add(verified);
        bar.inc(size(path));
    }
    bar.finish_and_clear();
    total
}
