//! Listing of a run's directory, which is the only index of its snapshots, and removal of files from it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::id::{FileRole, PartNumber, SnapshotId, parse};
use super::part_numbers::PartNumbers;
use super::rewind::{MARKER_FILE, Rewind};
use super::state_names::is_state;
use crate::error::{Error, Result, shown};
use crate::fs::{attempt, sync_directory};

/// Lists the snapshots of a run with the files of each, without opening them.
///
/// # Errors
/// As [`list_each`], and [`Error::Unexpected`] for a finished set of shards of which one is missing.
pub fn list(dir: &Path) -> Result<BTreeMap<SnapshotId, Vec<PathBuf>>> {
    list_each(dir)?.into_iter().map(|(id, files)| Ok((id, files?))).collect()
}

/// Lists the snapshots of a run with the files of each, or the reason why a snapshot is incomplete.
///
/// An incomplete set of shards without an index was never finished: it is left out, with a warning. So is an incomplete
/// set of a sharded training.
///
/// # Errors
/// [`Error::NoRun`] if the directory does not exist, [`Error::Io`] if it cannot be read.
pub fn list_each(dir: &Path) -> Result<BTreeMap<SnapshotId, Result<Vec<PathBuf>>>> {
    let mut found: BTreeMap<SnapshotId, BTreeSet<FileRole>> = BTreeMap::new();
    for name in current_names(dir)? {
        if let Some((id, role)) = parse(&name) {
            found.entry(id).or_default().insert(role);
        }
    }
    let mut snapshots = BTreeMap::new();
    for (id, roles) in found {
        if let Some(files) = complete(dir, id, &roles).transpose() {
            snapshots.insert(id, files);
        }
    }
    Ok(snapshots)
}

/// Returns the names of a run's files without those that a rewind sets aside, in order.
pub(super) fn current_names(dir: &Path) -> Result<Vec<String>> {
    loop {
        let mut names = names(dir)?;
        if !names.iter().any(|name| name == MARKER_FILE) {
            return Ok(names);
        }
        // A marker that is gone again belonged to a rewind that has been carried out: the names are old.
        let Some(rewind) = Rewind::read(dir)? else { continue };
        if rewind.counts(dir)? {
            names.retain(|name| !rewind.hides(dir, name));
        }
        return Ok(names);
    }
}

/// Returns the names of the files of a snapshot in a directory, of incomplete sets too.
pub fn files_of(dir: &Path, id: SnapshotId) -> Result<Vec<String>> {
    let is_own = |name: &String| parse(name).is_some_and(|(other, _)| other == id);
    Ok(names(dir)?.into_iter().filter(is_own).collect())
}

/// Returns the name of any file of a snapshot in a directory, finished or not.
///
/// # Errors
/// As [`list_each`].
pub fn any_snapshot_file(dir: &Path) -> Result<Option<String>> {
    Ok(names(dir)?.into_iter().find(|name| parse(name).is_some()))
}

/// Checks that a directory can take a new run: it has neither a live state nor a file of a snapshot. Other files do not
/// matter.
///
/// # Errors
/// [`Error::RunExists`], and as [`list_each`].
pub fn check_empty(dir: &Path) -> Result<()> {
    let found = names(dir)?.into_iter().find(|name| is_state(name) || parse(name).is_some());
    match found {
        Some(found) => Err(Error::RunExists { path: dir.to_owned(), found }),
        None => Ok(()),
    }
}

/// Returns the files of a snapshot in order, or `None` if it was never finished.
fn complete(dir: &Path, id: SnapshotId, roles: &BTreeSet<FileRole>) -> Result<Option<Vec<PathBuf>>> {
    let mut parts = PartNumbers::default();
    let mut others = BTreeSet::new();
    for &role in roles {
        match role {
            FileRole::Part(part) => parts.add(part),
            _ => drop(others.insert(role)),
        }
    }
    let other = if others.is_empty() { None } else { complete_unsharded(dir, id, &others)? };
    let name = |part: PartNumber| id.part_name(part.i, part.n);
    parts.warn_of_incomplete(dir, &format!("snapshot {id}"), &name);
    let sets = parts.complete().map(|n| (1..=n).map(|i| dir.join(id.part_name(i, n))).collect());
    let mut found = other.into_iter().chain(sets);
    match (found.next(), found.next()) {
        (Some(_), Some(second)) => {
            let why = "this snapshot exists twice, in two sets of files: move one of the two out";
            Err(Error::unexpected(&second[0], why))
        }
        (first, _) => Ok(first),
    }
}

/// As [`complete`], for the files of a training that is not sharded.
fn complete_unsharded(dir: &Path, id: SnapshotId, roles: &BTreeSet<FileRole>) -> Result<Option<Vec<PathBuf>>> {
    let shard_count = |role: &FileRole| if let FileRole::Shard { n, .. } = role { Some(*n) } else { None };
    let count = roles.iter().filter_map(shard_count).max();
    // The search ends after at most as many shards as there are files, whatever number a file name claims.
    let missing = count.and_then(|n| (1..=n).find(|&i| !roles.contains(&FileRole::Shard { i, n })));
    match (count, missing) {
        (Some(_), None) if roles.contains(&FileRole::Whole) => {
            let why = "this snapshot exists twice, in one file and in shards: move one of the two out";
            Err(Error::unexpected(&dir.join(id.file_name()), why))
        }
        _ if roles.contains(&FileRole::Whole) => Ok(Some(vec![dir.join(id.file_name())])),
        (Some(n), None) => Ok(Some((1..=n).map(|i| dir.join(id.shard_name(i, n))).collect())),
        (Some(n), Some(i)) if roles.contains(&FileRole::Index) => {
            let why = format!("this shard is missing: bring it back, or move all files of snapshot {id} out");
            Err(Error::unexpected(&dir.join(id.shard_name(i, n)), why))
        }
        (None, _) => {
            let why = "none of its shards is there: bring them back, or remove it";
            Err(Error::unexpected(&dir.join(id.index_name()), why))
        }
        _ => {
            tracing::warn!("{}: snapshot {id} was not finished and is left out", shown(dir));
            Ok(None)
        }
    }
}

/// Returns the names of all files in a directory, in order.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => match error.kind() {
            ErrorKind::NotFound => return Err(no_run(dir, "it does not exist")),
            ErrorKind::NotADirectory => return Err(no_run(dir, "it is not a directory")),
            _ => return Err(Error::io("list", dir)(error)),
        },
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        // Snapshots have no names that are not UTF-8.
        names.extend(name.into_string());
    }
    names.sort_unstable();
    Ok(names)
}

fn no_run(dir: &Path, reason: &str) -> Error {
    Error::NoRun { path: dir.to_owned(), reason: reason.to_owned() }
}

/// Removes a snapshot, its index first: shards without an index are not taken for a damaged set.
///
/// # Errors
/// [`Error::Io`].
pub fn remove(dir: &Path, id: SnapshotId, files: &[PathBuf]) -> Result<()> {
    let index = dir.join(id.index_name());
    for path in std::iter::once(&index).chain(files) {
        match attempt("remove", path, || fs::remove_file(path)) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            removed => removed?,
        }
    }
    sync_directory(dir)
}
