//! Live states in a directory: which one is the newest, and what a resume from it would go on with.

use std::path::{Path, PathBuf};

use super::Run;
use super::state::{LiveState, check_snapshots};
use crate::error::{Error, Result};
use crate::snapshot::{SAVED_STATE_FILE, STATE_FILE, StoredFile, list_states, saved_sets};

/// Summary of a run's live state, from which a resume continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// Step of the last call.
    pub step: u64,
    /// Step of the last update, if there was one.
    pub updated: Option<u64>,
    /// Size of all files in bytes.
    pub bytes: u64,
}

impl SavedState {
    /// Reads the summary of a run's newest live state, without its data. Returns `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`] or [`Error::Unexpected`] if a file cannot be used, [`Error::Mismatch`] if the
    /// files of a sharded run do not belong together.
    pub fn of(run: impl AsRef<Path>) -> Result<Option<SavedState>> {
        let state = find_state(run.as_ref())?;
        Ok(state.as_ref().map(SavedState::new))
    }

    /// Reads the summary of a state that [`PostHocEma::save_to`](crate::PostHocEma::save_to) wrote, given its file or
    /// the folder that it was saved into. Does not read its data.
    ///
    /// # Errors
    /// [`Error::NoState`] if there is none, and those of [`SavedState::of`].
    pub fn at(path: impl AsRef<Path>) -> Result<SavedState> {
        Ok(SavedState::new(&LiveState::open(&saved_files(path.as_ref())?)?))
    }

    fn new(state: &LiveState) -> SavedState {
        let bytes = state.files().iter().map(StoredFile::len).sum();
        SavedState { step: state.document.clock, updated: state.document.history.last(), bytes }
    }
}

/// Returns the files of a live state, given the path of one file or of a folder: one that it was saved into, or a run.
///
/// # Errors
/// [`Error::NoState`] if there is none.
pub(crate) fn saved_files(path: &Path) -> Result<Vec<PathBuf>> {
    let none = |reason: String| Err(Error::NoState { path: path.to_owned(), reason });
    if !path.is_dir() {
        return if path.exists() { Ok(vec![path.to_owned()]) } else { none("it does not exist".into()) };
    }
    let mut states = saved_sets(path)?;
    let file = path.join(SAVED_STATE_FILE);
    states.extend(file.exists().then(|| vec![file]));
    match newest(states)? {
        Some(files) => Ok(files),
        None => match newest_state(path)? {
            Some(files) => Ok(files),
            None => none(format!("it has neither {SAVED_STATE_FILE} nor {STATE_FILE} to resume from")),
        },
    }
}

/// Returns the files of the newest complete live state of a run; `None` if there is none.
///
/// # Errors
/// [`Error::Io`] if the directory cannot be read, and those of a state's files if it has several states.
pub(crate) fn newest_state(dir: &Path) -> Result<Option<Vec<PathBuf>>> {
    if !dir.is_dir() {
        return Ok(None);
    }
    let mut states: Vec<Vec<PathBuf>> = list_states(dir)?.into_iter().map(|state| state.files).collect();
    let file = dir.join(STATE_FILE);
    states.extend(file.is_file().then(|| vec![file]));
    newest(states)
}

/// Checks that the live state, if there is one, is of the run and contains the steps of its snapshots.
///
/// # Errors
/// As [`SavedState::of`], and [`Error::Unexpected`] for a snapshot of another run, or of a step that the state
/// lacks.
pub(super) fn check(dir: &Path, run: &Run) -> Result<()> {
    newest_state(dir)?.map_or(Ok(()), |files| check_snapshots(run, &LiveState::open(&files)?))
}

/// Opens the newest live state of a run; `None` if there is none.
fn find_state(dir: &Path) -> Result<Option<LiveState>> {
    let Some(files) = newest_state(dir)? else { return Ok(None) };
    match LiveState::open(&files) {
        // The tracker has replaced it since the listing.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            newest_state(dir)?.map(|files| LiveState::open(&files)).transpose()
        }
        opened => opened.map(Some),
    }
}

/// Returns the newest of some states by its first file: that of the last step, or of that step the last session.
fn newest(mut states: Vec<Vec<PathBuf>>) -> Result<Option<Vec<PathBuf>>> {
    if states.len() < 2 {
        return Ok(states.pop());
    }
    let mut newest = None;
    for files in states {
        let document = LiveState::first_document(&files)?;
        let age = (document.clock, document.session.map_or(0, |session| session.number));
        if newest.as_ref().is_none_or(|(other, _)| age > *other) {
            newest = Some((age, files));
        }
    }
    Ok(newest.map(|(_, files)| files))
}
