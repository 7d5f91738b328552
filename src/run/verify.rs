//! Verification of all files of a run.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Run, saved_state};
use crate::error::{Error, Result};
use crate::fs::start_threads;
use crate::snapshot::{self, Snapshot, StoredFile};

/// Result of the verification of a run.
#[derive(Debug)]
pub struct VerifyReport {
    /// Number of safetensors files in the directory.
    pub files: usize,
    /// Number of bytes of the intact ones.
    pub bytes: u64,
    /// Errors that were found, without duplicates.
    pub findings: Vec<Error>,
}

/// Reads every file of a run and compares headers and data with their checksums.
///
/// Checks that the snapshots belong together and that the live state contains their steps. Damaged files do not stop
/// the verification. Calls `progress` with the bytes of each file.
///
/// # Errors
/// [`Error::NoRun`] if the directory does not exist, [`Error::Io`] if it cannot be listed, [`Error::Threads`].
pub fn verify(dir: impl AsRef<Path>, progress: &mut dyn FnMut(u64)) -> Result<VerifyReport> {
    start_threads()?;
    let dir = dir.as_ref();
    let mut findings = Findings::default();
    for (id, files) in snapshot::list_each(dir)? {
        let snapshot = files.and_then(|files| Snapshot::open(id, &files));
        findings.add(snapshot.and_then(|snapshot| snapshot.verify_index()));
    }
    if findings.errors.is_empty() {
        // A running tracker writes the state before the snapshots, so a state that is read after them is never older.
        findings.add(Run::open(dir).and_then(|run| saved_state::check(dir, &run)));
    }
    let paths = files(dir)?;
    let mut bytes = 0;
    for path in &paths {
        let verified = StoredFile::open(path).and_then(|file| file.verify().map(|()| file.len()));
        bytes += verified.as_ref().copied().unwrap_or(0);
        findings.add(verified.map(drop));
        progress(path.metadata().map_or(0, |metadata| metadata.len()));
    }
    Ok(VerifyReport { files: paths.len(), bytes, findings: findings.errors })
}

/// Errors that were found so far, without duplicates.
#[derive(Default)]
struct Findings {
    errors: Vec<Error>,
    texts: HashSet<String>,
}

impl Findings {
    /// Adds an error, except that of a file that a tracker has dropped since the listing.
    fn add(&mut self, result: Result<()>) {
        let Err(error) = result else { return };
        if !snapshot::is_gone(&error) && self.texts.insert(error.to_string()) {
            self.errors.push(error);
        }
    }
}

/// Lists every safetensors file of the run, shards of incomplete sets included.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries: Vec<_> = fs::read_dir(dir).and_then(Iterator::collect).map_err(Error::io("list", dir))?;
    let paths = entries.into_iter().map(|entry: fs::DirEntry| entry.path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    paths.retain(|path| !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")));
    paths.sort();
    Ok(paths)
}
