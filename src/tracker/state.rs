//! The live state on disk: everything that a resume needs to go on with the same bits.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::PostHocEma;
use super::engine::{Engine, Start};
use super::moment::Moment;
use super::options::{OnError, Settings};
use super::table::{Entry, Table};
use super::values::Values;
use crate::compute::cpu::{Averages, Precision};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::math::History;
use crate::snapshot::{self, Lock, MAX_HEADER, STATE_FILE, StoredFile, TensorSpec, write_file};
use crate::synthesis::Run;

/// The key of the JSON in the file's metadata.
const STATE: &str = "state";

/// How the names of copied tensors begin in the file.
const COPIED: &str = "copied.";

/// What is stored beside the tensors.
#[derive(Serialize, Deserialize)]
struct Document {
    run: String,
    clock: u64,
    history: History,
    stored: Option<u64>,
    tied: BTreeMap<String, String>,
    settings: Settings,
    /// The model's dtype of each averaged tensor.
    dtypes: BTreeMap<String, Dtype>,
}

fn high_name(index: usize, tensor: &str) -> String {
    format!("{index}.average.{tensor}")
}

fn low_name(index: usize, tensor: &str) -> String {
    format!("{index}.low.{tensor}")
}

fn copy_name(tensor: &str) -> String {
    format!("{COPIED}{tensor}")
}

/// Bytes that a header takes for a tensor beside its name and shape: what begins its name, the keys, a dtype, and offsets of up to
/// 13 digits.
const ENTRY: usize = 12 + 48 + 26;

/// The dtype of an averaged tensor within the document, beside its name.
const DTYPE: usize = 14;

/// What is left to the history and the settings, which grow with neither the model nor, as a rule, the training.
pub(super) const REST: usize = 1_000_000;

/// Checks that the header of a live state can hold all that it tells of the tensors: it is the longest that a run has.
///
/// # Errors
/// [`Error::Setting`].
pub(super) fn check_header(table: &Table, settings: &Settings) -> Result<()> {
    let bytes = header_len(table, settings);
    if bytes <= MAX_HEADER {
        return Ok(());
    }
    let count = table.averaged().len() + table.copied().len();
    let reason = format!(
        "of {count} tensors the header of the live state would take {} MB, and the safetensors format allows {}: join small \
         tensors into larger ones, leave some out, or track fewer profiles",
        bytes / 1_000_000,
        MAX_HEADER / 1_000_000
    );
    Err(Error::Setting { option: "params", reason })
}

/// The most bytes that the header of a live state takes.
pub(super) fn header_len(table: &Table, settings: &Settings) -> usize {
    let each = settings.profiles.len() * if settings.precision == Precision::Compensated { 2 } else { 1 };
    let quoted = |text: &str| serde_json::json!(text).to_string();
    let entry = |entry: &Entry| quoted(&entry.name).len() + format!("{:?}", entry.shape).len() + ENTRY;
    let averaged = |own: &Entry| each * entry(own) + quoted(&quoted(&own.name)).len() + DTYPE;
    let tensors = table.averaged().iter().map(averaged).chain(table.copied().iter().map(entry));
    tensors.sum::<usize>() + REST
}

impl Moment {
    /// Writes the live state.
    pub(super) fn write_state(&self, values: &Values<'_>) -> Result<()> {
        let mut specs = Vec::new();
        let mut sources: Vec<&[u8]> = Vec::new();
        let mut add = |name: String, dtype, shape: &[usize], bytes| {
            specs.push(TensorSpec { name, dtype, shape: shape.to_vec() });
            sources.push(bytes);
        };
        for (index, averages) in values.averages.iter().enumerate() {
            for (i, Entry { name, shape, .. }) in self.table.averaged().iter().enumerate() {
                let place = self.table.layout().place(i);
                add(high_name(index, name), Dtype::F32, shape, bytemuck::cast_slice(&averages.high[place.clone()]));
                if let Some(low) = &averages.low {
                    add(low_name(index, name), Dtype::BF16, shape, bytemuck::cast_slice(&low[place]));
                }
            }
        }
        for (Entry { name, dtype, shape, .. }, bytes) in self.table.copied().iter().zip(values.copies) {
            add(copy_name(name), *dtype, shape, bytes);
        }
        let mut metadata = snapshot::base_strings();
        metadata.insert(STATE.into(), serde_json::json!(self.document()).to_string());
        let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| {
            dst.copy_from_slice(&sources[i][range]);
        };
        write_file(&self.dir.join(STATE_FILE), specs, metadata, &fill)
    }

    fn document(&self) -> Document {
        Document {
            run: self.run.clone(),
            clock: self.clock,
            history: self.history.clone(),
            stored: self.stored,
            tied: self.table.tied().clone(),
            settings: self.settings.clone(),
            dtypes: self.table.averaged().iter().map(|entry| (entry.name.clone(), entry.dtype)).collect(),
        }
    }
}

/// Opens a state and reads what it says of itself, not its data.
fn open(path: &Path) -> Result<(StoredFile, Document)> {
    let file = StoredFile::open(path)?;
    file.check_header()?;
    snapshot::check_version(path, file.metadata())?;
    let text = file.metadata().get(STATE).map(String::as_str).unwrap_or_default();
    let document: Document = serde_json::from_str(text)
        .map_err(|error| Error::damaged(path, format!("the metadata's `{STATE}` cannot be understood: {error}")))?;
    if document.history.last().is_some_and(|last| last > document.clock) {
        let why = format!("its clock, {}, is before its last update", document.clock);
        return Err(Error::damaged(path, why));
    }
    Ok((file, document))
}

/// What a run's live state says of itself: where a resume would go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// The time of the last call.
    pub step: u64,
    /// The time of the last update; none before the first.
    pub updated: Option<u64>,
    /// The size of the file.
    pub bytes: u64,
}

impl SavedState {
    /// Looks at the live state of the run in a directory, without reading its data; none where there is no such file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`] or [`Error::Unexpected`] for a file that cannot be used.
    pub fn of(run: impl AsRef<Path>) -> Result<Option<SavedState>> {
        match open(&run.as_ref().join(STATE_FILE)) {
            Ok((file, document)) => {
                Ok(Some(SavedState { step: document.clock, updated: document.history.last(), bytes: file.len() }))
            }
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A live state as it was read.
pub(super) struct Saved {
    file: StoredFile,
    document: Document,
    pub settings: Settings,
    pub tied: BTreeMap<String, String>,
}

impl Saved {
    /// Reads and verifies a state.
    pub(super) fn read(path: &Path) -> Result<Saved> {
        let (file, document) = open(path)?;
        file.verify()?;
        let (settings, tied) = (document.settings.clone(), document.tied.clone());
        Ok(Saved { file, document, settings, tied })
    }

    /// The time of the last call.
    pub(super) fn step(&self) -> u64 {
        self.document.clock
    }

    /// Rebuilds the tracker for a model whose tensors must be those of the state.
    pub(super) fn into_tracker(
        self,
        dir: PathBuf,
        settings: Settings,
        table: Table,
        lent_on: Option<usize>,
        device: Device,
        lock: Lock,
    ) -> Result<PostHocEma> {
        self.check_tensors(&table)?;
        let Document { run, clock, history, stored, .. } = &self.document;
        if !snapshot::list(&dir)?.is_empty() {
            check_snapshots(&Run::open(&dir)?, run, history)?;
        }
        let averages = (0..settings.profiles.len()).map(|index| self.averages(index, &table, settings.precision));
        let averages = averages.collect::<Result<_>>()?;
        let copies = table.copied().iter().map(|entry| self.bytes(&copy_name(&entry.name), entry.dtype, &entry.shape));
        let copies = copies.map(|bytes| bytes.map(<[u8]>::to_vec)).collect::<Result<_>>()?;
        let (run, clock, history, stored) = (run.clone(), *clock, history.clone(), *stored);
        let start = Start { values: Some((averages, copies)), ..Start::new(&table, &settings) };
        let engine = Engine::start(&dir, table.layout(), lent_on, device, start)?;
        Ok(PostHocEma {
            dir,
            settings,
            table,
            engine,
            clock,
            history,
            stored,
            pending: false,
            run,
            in_background: true,
            on_error: OnError::Stop,
            _lock: lock,
        })
    }

    /// Checks that the model averages exactly the tensors of the state, in the same dtypes.
    fn check_tensors(&self, table: &Table) -> Result<()> {
        let saved = &self.document.dtypes;
        for entry in table.averaged() {
            match saved.get(&entry.name) {
                None => return Err(Error::changed(&entry.name, "it was not averaged when the run began")),
                Some(&dtype) if dtype != entry.dtype => {
                    return Err(Error::changed(&entry.name, format!("its dtype is {}, it was {dtype}", entry.dtype)));
                }
                Some(_) => {}
            }
        }
        let averaged = |name: &&String| matches!(table.find(name), Some(Ok(_)));
        if let Some(missing) = saved.keys().find(|name| !averaged(name)) {
            return Err(Error::changed(missing, "it is no longer there to be averaged"));
        }
        self.check_copied(table)
    }

    /// Checks that the model copies exactly the tensors that the state has copies of.
    fn check_copied(&self, table: &Table) -> Result<()> {
        let saved = || self.file.tensors().keys().filter_map(|name| name.strip_prefix(COPIED));
        if let Some(new) = table.copied().iter().find(|entry| !saved().any(|name| name == entry.name)) {
            return Err(Error::changed(&new.name, "it was not there when the run began"));
        }
        match saved().find(|name| !matches!(table.find(name), Some(Err(_)))) {
            Some(missing) => Err(Error::changed(missing, "it is no longer there to be copied")),
            None => Ok(()),
        }
    }

    fn averages(&self, index: usize, table: &Table, precision: Precision) -> Result<Averages> {
        let mut averages = Averages::zeros(table.layout(), precision);
        for (i, Entry { name, shape, .. }) in table.averaged().iter().enumerate() {
            let place = table.layout().place(i);
            let high: &mut [u8] = bytemuck::cast_slice_mut(&mut averages.high[place.clone()]);
            high.copy_from_slice(self.bytes(&high_name(index, name), Dtype::F32, shape)?);
            if let Some(low) = &mut averages.low {
                let low: &mut [u8] = bytemuck::cast_slice_mut(&mut low[place]);
                low.copy_from_slice(self.bytes(&low_name(index, name), Dtype::BF16, shape)?);
            }
        }
        Ok(averages)
    }

    fn bytes(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8]> {
        let path = self.file.path();
        let Some(tensor) = self.file.tensors().get(name) else {
            return Err(Error::damaged(path, format!("it lacks the tensor `{name}`")));
        };
        if tensor.dtype != dtype || tensor.shape != shape {
            let reason = format!("it is {dtype} {shape:?}, in {} {} {:?}", path.display(), tensor.dtype, tensor.shape);
            return Err(Error::changed(name, reason));
        }
        Ok(self.file.bytes(tensor))
    }
}

/// Checks that the live state, where there is one, is of the run and leads to its snapshots.
///
/// # Errors
/// As [`SavedState::of`], and [`Error::Unexpected`] for a snapshot of another run, or of a step that the state has not come to.
pub(super) fn check(dir: &Path, run: &Run) -> Result<()> {
    match open(&dir.join(STATE_FILE)) {
        Ok((_, document)) => check_snapshots(run, &document.run, &document.history),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Checks that the snapshots are those of a live state's run and none is newer than it.
fn check_snapshots(on_disk: &Run, run: &str, history: &History) -> Result<()> {
    for snapshot in on_disk.snapshots() {
        if snapshot.meta.run.as_deref() != Some(run) {
            let why = format!("the snapshot belongs to another run than {STATE_FILE}: move it out of the directory");
            return Err(Error::unexpected(snapshot.path(), why));
        }
        if !history.contains(snapshot.stem.step) {
            let why = format!(
                "the snapshot is of step {}, which {STATE_FILE} (at step {}) does not lead to: move it out of the \
                 directory, or bring back the state that wrote it",
                snapshot.stem.step,
                history.last().unwrap_or(0)
            );
            return Err(Error::unexpected(snapshot.path(), why));
        }
    }
    Ok(())
}
