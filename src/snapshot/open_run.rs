//! The snapshots of a run, opened together and checked against each other.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::directory::{Snapshot, SnapshotId, list, list_each};
use crate::error::{Error, Result};

/// Opens all snapshots of a run, in order of profile and step, and checks that they belong together.
///
/// # Errors
/// [`Error::NoRun`] where there is none; those of [`Snapshot::open`] and [`Snapshot::check_sibling`].
pub fn open_all(dir: &Path) -> Result<Vec<Snapshot>> {
    // A tracker beside this reader may drop a snapshot between the listing and the opening: then the listing is old.
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
    let Some(((stem, paths), others)) = listed.split_first() else { return Err(nothing_in(dir)) };
    let first = Snapshot::open(*stem, paths)?;
    let open = |(stem, paths): &(SnapshotId, Vec<PathBuf>)| Snapshot::open_like(*stem, paths, Some(&first));
    // All of them first: of several errors the first snapshot's is told, whichever thread is done first.
    let opened: Vec<Result<Snapshot>> = others.par_iter().map(open).collect();
    let others: Vec<Snapshot> = opened.into_iter().collect::<Result<_>>()?;
    let snapshots: Vec<Snapshot> = std::iter::once(first).chain(others).collect();
    compared(&snapshots, &snapshots[0]).into_iter().collect::<Result<()>>()?;
    Ok(snapshots)
}

/// Compares each snapshot with one that stands for the run, and with the first sound one of its profile.
fn compared<'a>(snapshots: &'a [Snapshot], model: &Snapshot) -> Vec<Result<()>> {
    let mut profiles: BTreeMap<usize, &'a Snapshot> = BTreeMap::new();
    let compare = |snapshot: &'a Snapshot| {
        snapshot.check_sibling(model)?;
        snapshot.check_profile(profiles.entry(snapshot.stem.index).or_insert(snapshot))
    };
    snapshots.iter().map(compare).collect()
}

/// Opens the snapshots of a run that are whole and belong together, of which every byte is read, and tells why each of
/// the others is not used. `progress` is told the bytes of each file.
///
/// # Errors
/// [`Error::NoRun`] where there is none, and where none is whole the first one's error.
pub fn open_sound(dir: &Path, progress: &mut dyn FnMut(u64)) -> Result<(Vec<Snapshot>, Vec<Error>)> {
    let (mut whole, mut damaged) = (Vec::new(), Vec::new());
    for (stem, files) in list_each(dir)? {
        match files.and_then(|files| verified(stem, &files, progress)) {
            Ok(snapshot) => whole.push(snapshot),
            Err(error) if is_gone(&error) => {}
            Err(error) => damaged.push(error),
        }
    }
    let Some(model) = typical(&whole) else {
        return Err(if damaged.is_empty() { nothing_in(dir) } else { damaged.swap_remove(0) });
    };
    let verdicts = compared(&whole, model);
    let mut sound = Vec::with_capacity(whole.len());
    for (snapshot, verdict) in whole.into_iter().zip(verdicts) {
        match verdict {
            Ok(()) => sound.push(snapshot),
            Err(error) => damaged.push(error),
        }
    }
    Ok((sound, damaged))
}

fn verified(stem: SnapshotId, files: &[PathBuf], progress: &mut dyn FnMut(u64)) -> Result<Snapshot> {
    let snapshot = Snapshot::open(stem, files)?;
    for file in snapshot.files() {
        file.verify()?;
        progress(file.len());
    }
    Ok(snapshot)
}

/// A snapshot of the run that most of them are of: a few files of another run do not make the others strangers.
fn typical(snapshots: &[Snapshot]) -> Option<&Snapshot> {
    let mut runs: BTreeMap<&Option<String>, usize> = BTreeMap::new();
    snapshots.iter().for_each(|snapshot| *runs.entry(&snapshot.meta.run).or_default() += 1);
    let most = runs.values().max()?;
    snapshots.iter().find(|snapshot| runs[&snapshot.meta.run] == *most)
}

/// Whether a file was dropped since it was listed. A link to nothing is still there.
pub fn is_gone(error: &Error) -> bool {
    let missing = |path: &Path| path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound);
    matches!(error, Error::Io { source, path, .. } if source.kind() == ErrorKind::NotFound && missing(path))
}

fn nothing_in(dir: &Path) -> Error {
    Error::NoRun { path: dir.to_owned(), reason: "there is no snapshot in it".to_owned() }
}
