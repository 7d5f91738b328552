//! Live state of a run on disk: everything that a resume needs to continue with the same bits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::{Run, Settings};
use crate::error::{Difference, Error, Result, shown};
use crate::math::History;
use crate::snapshot::{self, Extension, SAVED_STATE_FILE, STATE_FILE, Session, StoredFile};

/// Key of the JSON document in the metadata of the file.
pub(crate) const STATE: &str = "state";

/// Prefix of the names of copied tensors in the file.
pub(crate) const COPIED: &str = "copied.";

/// State of a tracker, without tensor data.
#[derive(Serialize, Deserialize)]
pub(crate) struct StateDocument {
    /// Identifier of the run.
    pub run: String,
    /// Session that wrote the state. Older versions stored none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Session>,
    /// Sessions before it, of which each goes on from an update of the one before. Older versions stored none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lineage: Vec<Session>,
    /// Step of the last call.
    pub clock: u64,
    pub history: History,
    /// Newest step whose snapshots were stored, if there is one.
    pub stored: Option<u64>,
    pub tied: BTreeMap<String, String>,
    pub settings: Settings,
    /// Model dtype of each averaged tensor.
    pub dtypes: BTreeMap<String, Dtype>,
    /// Changes of the run's tensors, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extensions: Vec<Extension>,
}

/// Returns the stored name of an average, or of its high part if it is compensated.
pub(crate) fn high_name(index: usize, tensor: &str) -> String {
    format!("{index}.average.{tensor}")
}

/// Returns the stored name of the low part of a compensated average.
pub(crate) fn low_name(index: usize, tensor: &str) -> String {
    format!("{index}.low.{tensor}")
}

/// Returns the stored name of a copied tensor.
pub(crate) fn copy_name(tensor: &str) -> String {
    format!("{COPIED}{tensor}")
}

/// Opens a live state and reads its document, without its data.
fn open(path: &Path) -> Result<(StoredFile, StateDocument)> {
    let file = StoredFile::open(path)?;
    file.check_header()?;
    snapshot::check_version(path, file.metadata())?;
    let text = file.metadata().get(STATE).map(String::as_str).unwrap_or_default();
    let document: StateDocument = serde_json::from_str(text)
        .map_err(|error| Error::damaged(path, format!("the metadata's `{STATE}` cannot be parsed: {error}")))?;
    if document.history.last().is_some_and(|last| last > document.clock) {
        let why = format!("its clock, {}, is before its last update", document.clock);
        return Err(Error::damaged(path, why));
    }
    Ok((file, document))
}

/// Summary of a run's live state, from which a resume continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// Step of the last call.
    pub step: u64,
    /// Step of the last update, if there was one.
    pub updated: Option<u64>,
    /// Size of the file in bytes.
    pub bytes: u64,
}

impl SavedState {
    /// Reads the summary of a run's live state, without its data. Returns `None` if the file does not exist.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`] or [`Error::Unexpected`] if the file cannot be used.
    pub fn of(run: impl AsRef<Path>) -> Result<Option<SavedState>> {
        Ok(find(&run.as_ref().join(STATE_FILE))?.map(|(file, document)| SavedState::new(&file, &document)))
    }

    /// Reads the summary of a state that [`PostHocEma::save_to`](crate::PostHocEma::save_to) wrote, given its file or
    /// the folder that it was saved into. Does not read its data.
    ///
    /// # Errors
    /// [`Error::NoState`] if the file does not exist, and those of [`SavedState::of`].
    pub fn at(path: impl AsRef<Path>) -> Result<SavedState> {
        let (file, document) = open(&saved_path(path.as_ref())?)?;
        Ok(SavedState::new(&file, &document))
    }

    fn new(file: &StoredFile, document: &StateDocument) -> SavedState {
        SavedState { step: document.clock, updated: document.history.last(), bytes: file.len() }
    }
}

/// Returns the file of a live state, given its path or that of a folder: one that it was saved into, or a run.
///
/// # Errors
/// [`Error::NoState`] if it does not exist.
pub(crate) fn saved_path(path: &Path) -> Result<PathBuf> {
    let none = |reason: String| Err(Error::NoState { path: path.to_owned(), reason });
    if !path.is_dir() {
        return if path.exists() { Ok(path.to_owned()) } else { none("it does not exist".into()) };
    }
    match [SAVED_STATE_FILE, STATE_FILE].map(|name| path.join(name)).into_iter().find(|file| file.exists()) {
        Some(file) => Ok(file),
        None => none(format!("it has neither {SAVED_STATE_FILE} nor {STATE_FILE} to resume from")),
    }
}

/// Opens a live state and reads its document, without its data. Returns `None` if the file does not exist.
pub(crate) fn find(path: &Path) -> Result<Option<(StoredFile, StateDocument)>> {
    match open(path) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

/// Live state that was read from disk.
pub(crate) struct LiveState {
    pub file: StoredFile,
    pub document: StateDocument,
}

impl LiveState {
    /// Reads and verifies a live state.
    pub(crate) fn read(path: &Path) -> Result<LiveState> {
        let (file, document) = open(path)?;
        file.verify()?;
        Ok(LiveState { file, document })
    }

    /// Returns true for a tensor that the run averages, false for one that it copies, and `None` for any other.
    pub(crate) fn was_averaged(&self, name: &str) -> Option<bool> {
        if self.document.dtypes.contains_key(name) {
            return Some(true);
        }
        self.file.tensors().get(&copy_name(name)).map(|_| false)
    }

    /// Iterates over the names of the copied tensors.
    pub(crate) fn copied(&self) -> impl Iterator<Item = &str> {
        self.file.tensors().keys().filter_map(|name| name.strip_prefix(COPIED))
    }

    /// Returns the shape of an averaged tensor.
    pub(crate) fn averaged_shape(&self, name: &str) -> Option<&Vec<usize>> {
        self.file.tensors().get(&high_name(0, name)).map(|tensor| &tensor.shape)
    }

    /// Returns true if the state has a copy of this dtype and shape.
    pub(crate) fn has_copy(&self, name: &str, dtype: Dtype, shape: &[usize]) -> bool {
        let copy = self.file.tensors().get(&copy_name(name));
        copy.is_some_and(|tensor| tensor.dtype == dtype && tensor.shape == shape)
    }

    /// Returns the bytes of a tensor of the given dtype and shape.
    pub(crate) fn bytes(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8]> {
        let path = self.file.path();
        let Some(tensor) = self.file.tensors().get(name) else {
            return Err(Error::damaged(path, format!("it lacks the tensor `{name}`")));
        };
        if tensor.dtype != dtype || tensor.shape != shape {
            let stored = format!("{} {:?} in {}", tensor.dtype, tensor.shape, shown(path));
            return Err(Error::changed(name, Difference::new("the tensor", stored, format!("{dtype} {shape:?}"))));
        }
        Ok(self.file.bytes(tensor))
    }
}

/// Checks that the live state, if there is one, is of the run and contains the steps of its snapshots.
///
/// # Errors
/// As [`SavedState::of`], and [`Error::Unexpected`] for a snapshot of another run, or of a step that the state lacks.
pub(super) fn check(dir: &Path, run: &Run) -> Result<()> {
    find(&dir.join(STATE_FILE))?.map_or(Ok(()), |(_, document)| check_snapshots(run, &document))
}

/// Checks that the snapshots are of the run of a live state, of steps in its history, and of its session or an earlier
/// one.
pub(crate) fn check_snapshots(on_disk: &Run, state: &StateDocument) -> Result<()> {
    let history = &state.history;
    for snapshot in on_disk.snapshots() {
        if snapshot.meta.run.as_deref() != Some(&state.run) {
            let why = format!("the snapshot belongs to another run than {STATE_FILE}: move it out of the directory");
            return Err(Error::unexpected(snapshot.path(), why));
        }
        if !history.contains(snapshot.id.step) {
            let why = format!(
                "the snapshot is of step {}, which is not in the history of {STATE_FILE} (at step {}): move it out of \
                 the directory, or bring back the state that wrote it",
                snapshot.id.step,
                history.last().unwrap_or(0)
            );
            return Err(Error::unexpected(snapshot.path(), why));
        }
        if let (Some(own), Some(newest)) = (&snapshot.meta.session, &state.session)
            && !own.can_precede(snapshot.id.step, newest)
        {
            let why = format!(
                "two processes wrote this run at one time: the snapshot is of session {own}, which does not continue \
                 into session {newest} of {STATE_FILE}: move the snapshots of session {own} out of the directory, or \
                 bring back the state that belongs to them"
            );
            return Err(Error::unexpected(snapshot.path(), why));
        }
    }
    Ok(())
}
