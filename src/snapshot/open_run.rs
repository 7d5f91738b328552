//! Opening all snapshots of a run and checking them against each other.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::id::SnapshotId;
use super::listing::{list, list_each};
use super::open_snapshot::Snapshot;
use crate::error::{Error, Result};

/// Number of files up to which all files of a run are mapped at once. Linux allows a process 65,530 mappings.
const MAX_MAPPED: usize = 16_384;

/// Opens all snapshots of a run, in order of profile and step, and checks that they belong together.
///
/// # Errors
/// [`Error::NoRun`] if there is none; those of [`Snapshot::open`] and [`Snapshot::check_sibling`].
pub fn open_all(dir: &Path) -> Result<Vec<Snapshot>> {
    // A tracker in another process may drop a snapshot between the listing and the opening.
    for _ in 0..9 {
        match try_open_all(dir) {
            Err(error) if is_gone(&error) => {}
            result => return result,
        }
    }
    try_open_all(dir)
}

fn try_open_all(dir: &Path) -> Result<Vec<Snapshot>> {
    let listed: Vec<(SnapshotId, Vec<PathBuf>)> = list(dir)?.into_iter().collect();
    let Some(((id, paths), others)) = listed.split_first() else { return Err(no_snapshot(dir)) };
    let is_mapped = listed.iter().map(|(_, paths)| paths.len()).sum::<usize>() <= MAX_MAPPED;
    let first = Snapshot::open_like(*id, paths, None, is_mapped)?;
    let open = |(id, paths): &(SnapshotId, Vec<PathBuf>)| Snapshot::open_like(*id, paths, Some(&first), is_mapped);
    // Collected before the check, so that the first snapshot's error is returned, not that of the fastest thread.
    let opened: Vec<Result<Snapshot>> = others.par_iter().map(open).collect();
    let others: Vec<Snapshot> = opened.into_iter().collect::<Result<_>>()?;
    let snapshots: Vec<Snapshot> = std::iter::once(first).chain(others).collect();
    compare(&snapshots, &snapshots[0]).into_iter().collect::<Result<()>>()?;
    Ok(snapshots)
}

/// Compares each snapshot with `model`, which stands for the run, and with the first of its own profile.
fn compare<'a>(snapshots: &'a [Snapshot], model: &Snapshot) -> Vec<Result<()>> {
    let mut profiles: BTreeMap<usize, &'a Snapshot> = BTreeMap::new();
    let check = |snapshot: &'a Snapshot| {
        snapshot.check_sibling(model)?;
        snapshot.check_profile(profiles.entry(snapshot.id.index).or_insert(snapshot))
    };
    snapshots.iter().map(check).collect()
}

/// Opens the intact snapshots of a run that belong together, and returns the error of each of the others.
///
/// Reads every byte. Calls `progress` with the bytes of each file.
///
/// # Errors
/// [`Error::NoRun`] if the directory has no snapshot; the first snapshot's error if none is intact.
pub fn open_sound(dir: &Path, progress: &mut dyn FnMut(u64)) -> Result<(Vec<Snapshot>, Vec<Error>)> {
    let mut whole = Vec::new();
    let mut damaged = Vec::new();
    let listed = list_each(dir)?;
    let is_mapped = listed.values().flatten().map(Vec::len).sum::<usize>() <= MAX_MAPPED;
    for (id, files) in listed {
        match files.and_then(|files| open_verified(id, &files, whole.first(), is_mapped, progress)) {
            Ok(snapshot) => whole.push(snapshot),
            Err(error) if is_gone(&error) => {}
            Err(error) => damaged.push(error),
        }
    }
    let Some(model) = most_common_run(&whole) else {
        return Err(if damaged.is_empty() { no_snapshot(dir) } else { damaged.swap_remove(0) });
    };
    let verdicts = compare(&whole, model);
    let mut sound = Vec::with_capacity(whole.len());
    for (snapshot, verdict) in whole.into_iter().zip(verdicts) {
        match verdict {
            Ok(()) => sound.push(snapshot),
            Err(error) => damaged.push(error),
        }
    }
    Ok((sound, damaged))
}

/// Opens a snapshot and compares every byte with its checksums.
fn open_verified(
    id: SnapshotId,
    files: &[PathBuf],
    sibling: Option<&Snapshot>,
    is_mapped: bool,
    progress: &mut dyn FnMut(u64),
) -> Result<Snapshot> {
    let snapshot = Snapshot::open_like(id, files, sibling, is_mapped)?;
    for file in snapshot.files() {
        file.verify()?;
        progress(file.len());
    }
    Ok(snapshot)
}

/// Returns a snapshot of the run that most of them belong to, so that a few files of another run do not spoil the
/// others.
fn most_common_run(snapshots: &[Snapshot]) -> Option<&Snapshot> {
    let mut runs: BTreeMap<&Option<String>, usize> = BTreeMap::new();
    snapshots.iter().for_each(|snapshot| *runs.entry(&snapshot.meta.run).or_default() += 1);
    let most = runs.values().max()?;
    snapshots.iter().find(|snapshot| runs[&snapshot.meta.run] == *most)
}

/// Returns true if the error is that of a file dropped since it was listed. A dangling link is still there.
pub fn is_gone(error: &Error) -> bool {
    let missing = |path: &Path| path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound);
    matches!(error, Error::Io { source, path, .. } if source.kind() == ErrorKind::NotFound && missing(path))
}

fn no_snapshot(dir: &Path) -> Error {
    Error::NoRun { path: dir.to_owned(), reason: "no snapshot in it".to_owned() }
}
