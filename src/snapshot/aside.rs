//! Snapshots that are set aside: those of a course that a training left when it went back to an older live state.
//!
//! They are in `aside/ID` within the run, under their own names, with the live state of that course. Nothing reads them
//! but a further rewind. They are removed once the new course has a snapshot of its own.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::STATE_FILE;
use super::id::{SnapshotId, parse};
use super::listing::names;
use super::rewind::{ASIDE, MARKER_FILE, Rewind, is_folder_name};
use super::state_names::is_state;
use crate::error::{Error, Result};
use crate::fs::{self as files, attempt, sync_directory};

/// Folder with snapshots that are set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// Path of the folder. It can be opened like a run.
    pub path: PathBuf,
    /// Snapshots in it.
    pub snapshots: BTreeSet<SnapshotId>,
    /// True if it holds the live state of the course that was left.
    pub has_state: bool,
}

/// Lists what is set aside in a run, in the order of the folders' names.
///
/// # Errors
/// [`Error::Io`] if a folder cannot be read.
pub fn set_aside(run: impl AsRef<Path>) -> Result<Vec<SetAside>> {
    let aside = run.as_ref().join(ASIDE);
    // Not followed if it is a link: this crate creates none.
    if !aside.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for name in names(&aside)?.into_iter().filter(|name| is_folder_name(name)) {
        let path = aside.join(&name);
        if !path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            continue;
        }
        let names = match names(&path) {
            // A tracker has removed it since the listing.
            Err(Error::NoRun { .. }) => continue,
            names => names?,
        };
        let snapshots = names.iter().filter_map(|name| parse(name)).map(|(id, _)| id).collect();
        found.push(SetAside { has_state: names.iter().any(|name| is_state(name)), path, snapshots });
    }
    Ok(found)
}

/// Ends a rewind that a killed process left: carries it out if it counts, and takes it back otherwise.
///
/// The caller holds the lock of the run.
///
/// # Errors
/// [`Error::Damaged`] for a marker that cannot be read, and [`Error::Io`].
pub(crate) fn recover(dir: &Path) -> Result<()> {
    let Some(rewind) = Rewind::read(dir)? else { return Ok(()) };
    if rewind.counts(dir)? {
        return carry_out(dir, &rewind);
    }
    let folder = rewind.folder(dir);
    // Its only content is a second name of the live state.
    remove_file(&folder.join(STATE_FILE))?;
    remove_folder(&folder);
    remove_marker(dir)
}

/// Moves the files of a rewind that counts, and removes its marker. Files that have been moved already are skipped.
///
/// # Errors
/// [`Error::Io`]; [`recover`] then does the rest.
pub(crate) fn carry_out(dir: &Path, rewind: &Rewind) -> Result<()> {
    let folder = rewind.folder(dir);
    if !rewind.away.is_empty() {
        create_aside(dir, rewind)?;
    }
    for name in &rewind.away {
        let to = folder.join(name);
        if !to.exists() {
            rename(&dir.join(name), &to)?;
        }
    }
    if !rewind.away.is_empty() {
        sync_directory(&folder)?;
    }
    let mut emptied = BTreeSet::new();
    for (from, name) in &rewind.back {
        let from = dir.join(ASIDE).join(from);
        rename(&from.join(name), &dir.join(name))?;
        emptied.insert(from);
    }
    sync_directory(dir)?;
    emptied.iter().for_each(|folder| remove_folder(folder));
    remove_marker(dir)
}

/// Creates the folder that a rewind moves files to.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn create_aside(dir: &Path, rewind: &Rewind) -> Result<()> {
    let folder = rewind.folder(dir);
    attempt("create", &folder, || fs::create_dir_all(&folder))?;
    sync_directory(&dir.join(ASIDE))?;
    sync_directory(dir)
}

/// Removes the files of a folder that is set aside for which `is_own` returns true, and the folder if it is then empty.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove_set_aside(found: &SetAside, is_own: impl Fn(&Path) -> bool) -> Result<()> {
    let names = match names(&found.path) {
        // Another process of a sharded run has removed it.
        Err(Error::NoRun { .. }) => return Ok(()),
        names => names?,
    };
    for name in names {
        let path = found.path.join(&name);
        if (is_state(&name) || parse(&name).is_some()) && is_own(&path) {
            remove_file(&path)?;
        }
    }
    remove_folder(&found.path);
    Ok(())
}

/// Removes a folder in `aside`, and `aside` itself, if they are empty.
fn remove_folder(folder: &Path) {
    files::remove_leftovers(folder);
    // Fails if a file is left in it.
    if fs::remove_dir(folder).is_ok()
        && let Some(aside) = folder.parent()
    {
        let _ = fs::remove_dir(aside);
    }
}

fn remove_marker(dir: &Path) -> Result<()> {
    remove_file(&dir.join(MARKER_FILE))?;
    sync_directory(dir)
}

/// Removes a file, if it is there.
fn remove_file(path: &Path) -> Result<()> {
    missing_is_fine(attempt("remove", path, || fs::remove_file(path)))
}

/// Renames a file, if it is there.
fn rename(from: &Path, to: &Path) -> Result<()> {
    missing_is_fine(attempt("rename", from, || fs::rename(from, to)))
}

fn missing_is_fine(done: Result<()>) -> Result<()> {
    match done {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
