//! Live state of a run on disk: everything that a resume needs to continue with the same bits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::{Run, Settings};
use crate::error::{Difference, Error, Result};
use crate::math::History;
use crate::snapshot::{self, Extension, PartPlace, STATE_FILE, Session, StoredFile, StoredTensor, TensorSet};

/// Key of the JSON document in the metadata of each file.
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

/// Reads the document of one file of a live state, after a check of its header.
pub(super) fn document(file: &StoredFile) -> Result<StateDocument> {
    let path = file.path();
    snapshot::check_version(path, file.metadata())?;
    let text = file.metadata().get(STATE).map(String::as_str).unwrap_or_default();
    let document: StateDocument = serde_json::from_str(text)
        .map_err(|error| Error::damaged(path, format!("the metadata's `{STATE}` cannot be parsed: {error}")))?;
    if document.history.last().is_some_and(|last| last > document.clock) {
        let why = format!("its clock, {}, is before its last update", document.clock);
        return Err(Error::damaged(path, why));
    }
    Ok(document)
}

impl StateDocument {
    /// Adds what the document of another file of the same state says of the tensors in that file.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the files are not of one state.
    fn join(&mut self, path: &Path, (other_path, other): (&Path, StateDocument)) -> Result<()> {
        let differs = |what: &str, own: String, others: String| {
            Err(Error::mismatch(other_path, path, Difference::new(format!("the {what} of the state"), own, others)))
        };
        let shown = |session: &Option<Session>| session.as_ref().map_or("none".to_owned(), ToString::to_string);
        if self.run != other.run {
            return differs("run", self.run.clone(), other.run);
        }
        if self.clock != other.clock {
            return differs("step", self.clock.to_string(), other.clock.to_string());
        }
        if self.session != other.session {
            return differs("session", shown(&self.session), shown(&other.session));
        }
        let rest = |state: &StateDocument| {
            serde_json::json!([state.history, state.lineage, state.settings, state.extensions]).to_string()
        };
        if rest(self) != rest(&other) {
            return differs("history or settings", rest(self), rest(&other));
        }
        self.stored = self.stored.max(other.stored);
        self.tied.extend(other.tied);
        self.dtypes.extend(other.dtypes);
        Ok(())
    }
}

/// Live state on disk: one file, or those of all processes of a sharded run.
pub(crate) struct LiveState {
    set: TensorSet,
    pub document: StateDocument,
}

impl LiveState {
    /// Opens the files of a live state, without a look at their data.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`] or [`Error::Unexpected`] for a file that cannot be used, and
    /// [`Error::Mismatch`] for files that do not belong together.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<LiveState> {
        let set = TensorSet::open(paths, None, true)?;
        let Some((first, others)) = set.files().split_first() else {
            return Err(Error::Internal("a live state has no file".into()));
        };
        let mut joined = document(first)?;
        for file in others {
            joined.join(first.path(), (file.path(), document(file)?))?;
        }
        Ok(LiveState { set, document: joined })
    }

    /// Reads the document of the first file of a live state.
    ///
    /// # Errors
    /// As [`LiveState::open`].
    pub(crate) fn first_document(paths: &[PathBuf]) -> Result<StateDocument> {
        let Some(first) = paths.first() else { return Err(Error::Internal("a live state has no file".into())) };
        let file = StoredFile::open(first)?;
        file.check_header()?;
        document(&file)
    }

    /// Opens a live state and compares its data with their checksums: all files, or those that `is_verified` selects by
    /// their index.
    ///
    /// # Errors
    /// As [`LiveState::open`].
    pub(crate) fn read(paths: &[PathBuf], is_verified: impl Fn(usize) -> bool) -> Result<LiveState> {
        let state = LiveState::open(paths)?;
        let mut files = state.set.files().iter().enumerate().filter(|(i, _)| is_verified(*i));
        files.try_for_each(|(_, file)| file.verify())?;
        Ok(state)
    }

    /// Returns the first file, which stands for the state in messages.
    pub(crate) fn path(&self) -> &Path {
        self.set.files()[0].path()
    }

    /// Returns the files.
    pub(crate) fn files(&self) -> &[StoredFile] {
        self.set.files()
    }

    /// Returns true for the files of a sharded run.
    pub(crate) fn is_sharded(&self) -> bool {
        self.set.has_parts()
    }

    /// Returns a stored tensor by its name in the files. Its shape is that of the whole tensor.
    pub(crate) fn stored(&self, name: &str) -> Option<&StoredTensor> {
        self.set.get(name)
    }

    /// Returns true for a tensor that the run averages, false for one that it copies, and `None` for any other.
    pub(crate) fn was_averaged(&self, name: &str) -> Option<bool> {
        if self.document.dtypes.contains_key(name) {
            return Some(true);
        }
        self.stored(&copy_name(name)).map(|_| false)
    }

    /// Iterates over the names of the copied tensors.
    pub(crate) fn copied(&self) -> impl Iterator<Item = &str> {
        self.set.tensors().filter_map(|(name, _)| name.strip_prefix(COPIED))
    }

    /// Returns the shape of an averaged tensor.
    pub(crate) fn averaged_shape(&self, name: &str) -> Option<&Vec<usize>> {
        self.stored(&high_name(0, name)).map(|tensor| &tensor.shape)
    }

    /// Returns true if the state has a copy of this dtype and shape.
    pub(crate) fn has_copy(&self, name: &str, dtype: Dtype, shape: &[usize]) -> bool {
        let copy = self.stored(&copy_name(name));
        copy.is_some_and(|tensor| tensor.dtype == dtype && tensor.shape == shape)
    }

    /// Reads a part of a tensor of the given dtype. `shape` is that of the part.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the state lacks it, [`Error::Changed`] if it has another shape or dtype.
    pub(crate) fn read_part(&self, name: &str, dtype: Dtype, part: &PartPlace, shape: &[usize]) -> Result<Vec<u8>> {
        let Some(tensor) = self.stored(name) else {
            return Err(Error::damaged(self.path(), format!("it lacks the tensor `{name}`")));
        };
        if tensor.dtype != dtype || tensor.shape != part.global {
            let stored = format!("{} {:?} in {}", tensor.dtype, tensor.shape, self.path().display());
            let now = format!("{dtype} {:?}", part.global);
            return Err(Error::changed(name, Difference::new("the tensor", stored, now)));
        }
        if shape == tensor.shape
            && let Some(bytes) = self.set.whole(name)?
        {
            return Ok(bytes.to_vec());
        }
        let lacks = || Error::damaged(self.path(), format!("it lacks the tensor `{name}`"));
        let region = self.set.region(name, part, shape)?.ok_or_else(lacks)?;
        let mut bytes = vec![0; region.elements.len()];
        region.elements.copy(&mut bytes, 0);
        Ok(bytes)
    }
}

/// Checks that the snapshots are of the run of a live state, of steps in its history, and of its session or an earlier
/// one.
pub(crate) fn check_snapshots(on_disk: &Run, live: &LiveState) -> Result<()> {
    let state = &live.document;
    let name = match live.is_sharded() {
        true => live.path().file_name().unwrap_or_default().to_string_lossy(),
        false => STATE_FILE.into(),
    };
    let history = &state.history;
    for snapshot in on_disk.snapshots() {
        if snapshot.meta.run.as_deref() != Some(&state.run) {
            let why = format!("the snapshot belongs to another run than {name}: move it out of the directory");
            return Err(Error::unexpected(snapshot.path(), why));
        }
        if !history.contains(snapshot.id.step) {
            let why = format!(
                "the snapshot is of step {}, which is not in the history of {name} (at step {}): move it out of the \
                 directory, or bring back the state that wrote it",
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
                 into session {newest} of {name}: move the snapshots of session {own} out of the directory, or bring \
                 back the state that belongs to them"
            );
            return Err(Error::unexpected(snapshot.path(), why));
        }
    }
    Ok(())
}
