//! Live state on disk: everything that a resume needs to continue with the same bits.

use std::ops::Range;
use std::path::PathBuf;

use safetensors::Dtype;

use super::PostHocEma;
use super::engine::{Engine, EngineConfig};
use super::moment::CheckpointMeta;
use super::options::OnError;
use super::table::{Entry, TensorRegistry};
use super::values::Values;
use crate::compute::cpu::{Averages, Precision};
use crate::device::Device;
use crate::error::{Difference, Error, Result};
use crate::snapshot::{self, MAX_HEADER, STATE_FILE, write_file};

use crate::fs::Lock;

use crate::run::{COPIED, Run, STATE, Saved, Settings, StateDocument, check_snapshots, copy_name, high_name, low_name};
use crate::tensor::TensorSpec;

/// Bytes of a tensor's header entry beside its name and shape: name prefix, keys, dtype, and offsets of up to 13
/// digits.
const ENTRY: usize = 12 + 48 + 26;

/// Bytes of an averaged tensor's dtype in the document, beside its name.
const DTYPE: usize = 14;

/// Bytes reserved for the history and the settings, which do not grow with the model.
pub(super) const REST: usize = 1_000_000;

/// Checks that the header of a live state, the longest of a run's headers, fits the safetensors format.
///
/// # Errors
/// [`Error::Setting`] if it does not.
pub(super) fn check_header(table: &TensorRegistry, settings: &Settings) -> Result<()> {
    let bytes = header_len(table, settings);
    if bytes <= MAX_HEADER {
        return Ok(());
    }
    let count = table.averaged().len() + table.copied().len();
    let reason = format!(
        "of {count} tensors the header of the live state would take {} MB, and the safetensors format allows {}: join \
         small tensors into larger ones, leave some out, or track fewer profiles",
        bytes / 1_000_000,
        MAX_HEADER / 1_000_000
    );
    Err(Error::Setting { option: "params", reason })
}

/// Returns an upper bound of the header's length in bytes.
pub(super) fn header_len(table: &TensorRegistry, settings: &Settings) -> usize {
    let each = settings.profiles.len() * if settings.precision == Precision::Compensated { 2 } else { 1 };
    let quoted = |text: &str| serde_json::json!(text).to_string();
    let entry = |entry: &Entry| quoted(&entry.name).len() + format!("{:?}", entry.shape).len() + ENTRY;
    let averaged = |own: &Entry| each * entry(own) + quoted(&quoted(&own.name)).len() + DTYPE;
    let tensors = table.averaged().iter().map(averaged).chain(table.copied().iter().map(entry));
    tensors.sum::<usize>() + REST
}

impl CheckpointMeta {
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

    fn document(&self) -> StateDocument {
        StateDocument {
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

impl Saved {
    /// Rebuilds the tracker for a model, whose tensors must be those of the state.
    pub(super) fn into_tracker(
        self,
        dir: PathBuf,
        settings: Settings,
        table: TensorRegistry,
        model_device: Option<usize>,
        device: Device,
        lock: Lock,
    ) -> Result<PostHocEma> {
        self.check_tensors(&table)?;
        let StateDocument { run, clock, history, stored, .. } = &self.document;
        if !snapshot::list(&dir)?.is_empty() {
            check_snapshots(&Run::open(&dir)?, run, history)?;
        }
        let averages = (0..settings.profiles.len()).map(|index| self.averages(index, &table, settings.precision));
        let averages = averages.collect::<Result<_>>()?;
        let copies = table.copied().iter().map(|entry| self.bytes(&copy_name(&entry.name), entry.dtype, &entry.shape));
        let copies = copies.map(|bytes| bytes.map(<[u8]>::to_vec)).collect::<Result<_>>()?;
        let (run, clock, history, stored) = (run.clone(), *clock, history.clone(), *stored);
        let start = EngineConfig { values: Some((averages, copies)), ..EngineConfig::new(&table, &settings) };
        let engine = Engine::start(&dir, table.layout(), model_device, device, start)?;
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
    fn check_tensors(&self, table: &TensorRegistry) -> Result<()> {
        let saved = &self.document.dtypes;
        for entry in table.averaged() {
            match saved.get(&entry.name) {
                None => {
                    return Err(Error::changed(
                        &entry.name,
                        Difference::new("the tensor", "not averaged when the run began", "averaged"),
                    ));
                }
                Some(&dtype) if dtype != entry.dtype => {
                    return Err(Error::changed(&entry.name, Difference::new("its dtype", dtype, entry.dtype)));
                }
                Some(_) => {}
            }
        }
        let averaged = |name: &&String| matches!(table.find(name), Some(Ok(_)));
        if let Some(missing) = saved.keys().find(|name| !averaged(name)) {
            return Err(Error::changed(missing, Difference::new("the tensor", "averaged", "missing")));
        }
        self.check_copied(table)
    }

    /// Checks that the model copies exactly the tensors that the state holds copies of.
    fn check_copied(&self, table: &TensorRegistry) -> Result<()> {
        let saved = || self.file.tensors().keys().filter_map(|name| name.strip_prefix(COPIED));
        if let Some(new) = table.copied().iter().find(|entry| !saved().any(|name| name == entry.name)) {
            return Err(Error::changed(&new.name, Difference::new("the tensor", "missing when the run began", "new")));
        }
        match saved().find(|name| !matches!(table.find(name), Some(Err(_)))) {
            Some(missing) => Err(Error::changed(missing, Difference::new("the tensor", "copied", "missing"))),
            None => Ok(()),
        }
    }

    fn averages(&self, index: usize, table: &TensorRegistry, precision: Precision) -> Result<Averages> {
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
}
