//! Live state on disk: everything that a resume needs to continue with the same bits.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::checkpoint_meta::CheckpointMeta;
use super::registry::{Entry, TensorRegistry};
use super::values::Values;
use crate::compute::cpu::{Averages, Precision, low_order};
use crate::error::{Difference, Error, Result};
use crate::run::{LiveState, STATE, Settings, StateDocument, copy_name, high_name, low_name};
use crate::snapshot::{self, MAX_HEADER, STATE_FILE, StoredFile, write_file, write_part};
use crate::tensor::TensorSpec;

/// Bytes of a tensor's header entry beside its name and shape: name prefix, keys, dtype, and offsets of up to 13
/// digits.
const ENTRY: usize = 12 + 48 + 26;

/// Bytes of an averaged tensor's dtype in the document, beside its name.
const DTYPE: usize = 14;

/// Bytes of the keys of a part's place, beside its name and numbers, with the prefix of the name.
const PLACE: usize = 2 * 12 + 48;

/// Bytes reserved for the history and the settings, which do not grow with the model.
pub(super) const REST: usize = 1_000_000;

/// Checks that the header of a live state, the longest of a run's headers, fits the safetensors format.
///
/// # Errors
/// [`Error::Setting`] if it does not.
pub(super) fn check_header(registry: &TensorRegistry, settings: &Settings) -> Result<()> {
    let bytes = header_len(registry, settings);
    if bytes <= MAX_HEADER {
        return Ok(());
    }
    let count = registry.averaged().len() + registry.copied().len();
    let reason = format!(
        "of {count} tensors the header of the live state would take {} MB, and the safetensors format allows {}: join \
         small tensors into larger ones, leave some out, or track fewer profiles",
        bytes / 1_000_000,
        MAX_HEADER / 1_000_000
    );
    Err(Error::Setting { option: "params", reason })
}

/// Returns an upper bound of the header's length in bytes.
pub(super) fn header_len(registry: &TensorRegistry, settings: &Settings) -> usize {
    let parts = if settings.precision == Precision::Compensated { 2 } else { 1 };
    let entries = parts * settings.profiles.len();
    let averaged = registry.averaged().iter().map(|entry| entries * entry_len(entry) + dtype_len(entry));
    let copied = registry.copied().iter().map(entry_len);
    averaged.chain(copied).sum::<usize>() + REST
}

/// Returns an upper bound of the bytes of one header entry.
fn entry_len(entry: &Entry) -> usize {
    let own = quoted(&entry.name).len() + format!("{:?}", entry.shape).len() + ENTRY;
    if entry.global == entry.shape {
        return own;
    }
    // A part has its place twice, as JSON within a JSON string.
    own + 2 * quoted(&quoted(&entry.name)).len() + format!("{:?}{:?}", entry.global, entry.offset).len() + PLACE
}

/// Returns an upper bound of the bytes of a tensor's dtype in the document, which is JSON within a JSON string.
fn dtype_len(entry: &Entry) -> usize {
    quoted(&quoted(&entry.name)).len() + DTYPE
}

fn quoted(text: &str) -> String {
    serde_json::json!(text).to_string()
}

impl CheckpointMeta {
    /// Writes the live state of the run.
    pub(super) fn write_state(&self, values: &Values<'_>) -> Result<()> {
        let path = self.state_path();
        if self.shard.is_some() && self.is_state_on_disk(&path) {
            return Ok(());
        }
        self.write_state_to(&path, values)
    }

    /// Returns the file of the run's live state that this process writes.
    pub(super) fn state_path(&self) -> PathBuf {
        self.dir.join(self.shard.map_or_else(|| STATE_FILE.to_owned(), |shard| shard.state_name(self.clock)))
    }

    /// Writes the live state to a path.
    pub(super) fn write_state_to(&self, path: &Path, values: &Values<'_>) -> Result<()> {
        self.lock.check()?;
        let mut specs = Vec::new();
        let mut sources: Vec<&[u8]> = Vec::new();
        let mut places = Vec::new();
        let mut add = |name: String, dtype, entry: &Entry, bytes| {
            specs.push(TensorSpec { name, dtype, shape: entry.shape.clone() });
            places.push(entry.place());
            sources.push(bytes);
        };
        for (index, averages) in values.averages.iter().enumerate() {
            for (i, entry) in self.registry.averaged().iter().enumerate().filter(|(_, entry)| entry.is_stored) {
                let range = self.registry.layout().range(i);
                let high = bytemuck::cast_slice(&averages.high[range.clone()]);
                add(high_name(index, &entry.name), Dtype::F32, entry, high);
                if let Some(low) = &averages.low {
                    add(low_name(index, &entry.name), Dtype::I16, entry, bytemuck::cast_slice(&low[range]));
                }
            }
        }
        let copied = self.registry.copied().iter().zip(values.copies);
        for (entry, bytes) in copied.filter(|(entry, _)| entry.is_stored) {
            add(copy_name(&entry.name), entry.dtype, entry, bytes);
        }
        let mut metadata = match self.settings.precision {
            Precision::Compensated => snapshot::terms_strings(),
            Precision::Plain => snapshot::versioned_strings(&self.extensions),
        };
        metadata.insert(STATE.into(), serde_json::json!(self.document()).to_string());
        let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| {
            dst.copy_from_slice(&sources[i][range]);
        };
        match self.shard {
            None => write_file(path, specs, metadata, &fill),
            Some(_) => write_part(path, specs, &places, metadata, &fill),
        }
    }

    /// Returns true if the live state of the run on disk is the one that [`CheckpointMeta::write_state`] would write.
    pub(super) fn is_stored(&self) -> bool {
        // A session is one process, so that the same document stands for the same averages.
        let path = self.state_path();
        let stored = StoredFile::open(&path).and_then(|file| file.check_header().map(|()| file));
        stored.is_ok_and(|file| file.metadata().get(STATE) == Some(&serde_json::json!(self.document()).to_string()))
    }

    fn document(&self) -> StateDocument {
        let averaged = self.registry.averaged().iter().filter(|entry| entry.is_stored);
        StateDocument {
            run: self.run_id.clone(),
            session: self.session.clone(),
            lineage: self.lineage.clone(),
            clock: self.clock,
            history: self.history.clone(),
            stored: self.stored,
            tied: self.registry.model_tied().clone(),
            settings: self.settings.clone(),
            dtypes: averaged.map(|entry| (entry.name.clone(), entry.dtype)).collect(),
            extensions: self.extensions.clone(),
        }
    }
}

/// Checks that the model averages and copies exactly the tensors of the state, in the same dtypes. A process of a
/// sharded run may lack some of them.
///
/// # Errors
/// [`Error::Changed`] for the first tensor that differs.
pub(super) fn check_tensors(saved: &LiveState, registry: &TensorRegistry, is_whole: bool) -> Result<()> {
    let dtypes = &saved.document.dtypes;
    for entry in registry.averaged() {
        let difference = match dtypes.get(&entry.name) {
            None => Difference::new("the tensor", "not averaged when the run began", "averaged"),
            Some(&dtype) if dtype != entry.dtype => Difference::new("its dtype", dtype, entry.dtype),
            Some(_) => continue,
        };
        return Err(Error::changed(&entry.name, difference));
    }
    for name in dtypes.keys() {
        let found = registry.find(name);
        if !matches!(found, Some(Ok(_))) && (is_whole || found.is_some()) {
            return Err(Error::changed(name, Difference::new("the tensor", "averaged", "missing")));
        }
    }
    check_copied(saved, registry, is_whole)
}

/// Checks that the model copies exactly the tensors that the state holds copies of.
fn check_copied(saved: &LiveState, registry: &TensorRegistry, is_whole: bool) -> Result<()> {
    for Entry { name, .. } in registry.copied() {
        if saved.stored(&copy_name(name)).is_none() {
            return Err(Error::changed(name, Difference::new("the tensor", "missing when the run began", "new")));
        }
    }
    for name in saved.copied() {
        let found = registry.find(name);
        if !matches!(found, Some(Err(_))) && (is_whole || found.is_some()) {
            return Err(Error::changed(name, Difference::new("the tensor", "copied", "missing")));
        }
    }
    Ok(())
}

/// Reads the averages of every profile and the copied tensors of a state. Leaves those that begin at zero.
///
/// # Errors
/// [`Error::Damaged`] or [`Error::Changed`] for a tensor that is missing or has another shape.
pub(super) fn read_values(
    saved: &LiveState,
    registry: &TensorRegistry,
    settings: &Settings,
    begun: &BTreeSet<String>,
) -> Result<(Vec<Averages>, Vec<Vec<u8>>)> {
    let mut averages = vec![Averages::zeros(registry.layout(), settings.precision); settings.profiles.len()];
    for (index, averages) in averages.iter_mut().enumerate() {
        read_averages(averages, saved, index, registry, begun)?;
    }
    let mut copies = Vec::with_capacity(registry.copied().len());
    for entry in registry.copied() {
        copies.push(match begun.contains(&entry.name) {
            true => vec![0; entry.bytes],
            false => read(saved, &copy_name(&entry.name), entry.dtype, entry)?,
        });
    }
    Ok((averages, copies))
}

fn read_averages(
    averages: &mut Averages,
    saved: &LiveState,
    index: usize,
    registry: &TensorRegistry,
    begun: &BTreeSet<String>,
) -> Result<()> {
    let entries = registry.averaged().iter().enumerate();
    for (i, entry) in entries.filter(|(_, entry)| !begun.contains(&entry.name)) {
        let place = registry.layout().range(i);
        let high: &mut [u8] = bytemuck::cast_slice_mut(&mut averages.high[place.clone()]);
        high.copy_from_slice(&read(saved, &high_name(index, &entry.name), Dtype::F32, entry)?);
        if let Some(low) = &mut averages.low {
            read_terms(&mut low[place.clone()], &averages.high[place], saved, (&low_name(index, &entry.name), entry))?;
        }
    }
    Ok(())
}

/// Reads this process's part of a tensor of a state.
fn read(saved: &LiveState, name: &str, dtype: Dtype, entry: &Entry) -> Result<Vec<u8>> {
    saved.read_part(name, dtype, &entry.place(), &entry.shape)
}

/// Reads the low-order terms of averages. Those in bf16, of older versions, become integers.
fn read_terms(terms: &mut [i16], values: &[f32], saved: &LiveState, (name, entry): (&str, &Entry)) -> Result<()> {
    if saved.stored(name).is_none_or(|tensor| tensor.dtype != Dtype::BF16) {
        let terms: &mut [u8] = bytemuck::cast_slice_mut(terms);
        terms.copy_from_slice(&read(saved, name, Dtype::I16, entry)?);
        return Ok(());
    }
    let halves = read(saved, name, Dtype::BF16, entry)?;
    low_order::from_bf16(terms, values, &halves).map_err(|element| {
        let why = format!("element {element} of `{name}` is larger than the rounding error of its average");
        Error::damaged(saved.path(), why)
    })
}
