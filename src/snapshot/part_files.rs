//! All files of a run's snapshots and live states, of incomplete sets too, for processes that own only some of them.

use std::path::{Path, PathBuf};

use super::id::{FileRole, PartNumber, SnapshotId, parse};
use super::listing::current_names;
use super::state_names::parse_state_part;
use crate::error::Result;

/// Snapshot or live state that a file belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileOf {
    Snapshot(SnapshotId),
    /// Live state of a sharded run at a step.
    State(u64),
}

/// File of a snapshot or of a live state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListedFile {
    pub of: FileOf,
    /// Number in its set, for the file of one process of a sharded run.
    pub part: Option<PartNumber>,
    pub path: PathBuf,
}

/// Lists the files of a run, indices of shards first.
///
/// # Errors
/// As [`list_each`](super::list_each).
pub(crate) fn list_files(dir: &Path) -> Result<Vec<ListedFile>> {
    let file = |name: &String| {
        let path = dir.join(name);
        if let Some((step, part)) = parse_state_part(name) {
            return Some(ListedFile { of: FileOf::State(step), part: Some(part), path });
        }
        let (id, role) = parse(name)?;
        let part = if let FileRole::Part(part) = role { Some(part) } else { None };
        Some(ListedFile { of: FileOf::Snapshot(id), part, path })
    };
    let mut files: Vec<ListedFile> = current_names(dir)?.iter().filter_map(file).collect();
    files.sort_by_key(|file| file.path.extension().is_none_or(|extension| extension != "json"));
    Ok(files)
}

/// Returns true if all files of a snapshot or a state are there.
pub(crate) fn is_complete(files: &[ListedFile], of: FileOf) -> bool {
    let own = || files.iter().filter(|file| file.of == of);
    own().any(|file| match file.part {
        None => true,
        // Names differ, so that equal sizes count different numbers.
        Some(PartNumber { i: 1, n }) => own().filter(|other| other.part.is_some_and(|part| part.n == n)).count() == n,
        Some(_) => false,
    })
}
