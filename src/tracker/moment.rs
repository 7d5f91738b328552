//! Checkpoint of a run at one update: the live state, a snapshot of every average, and retention.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;

use safetensors::Dtype;

use super::table::{Entry, TensorRegistry};
use super::values::Values;
use crate::compute::cpu;
use crate::error::{Error, Result};
use crate::math::{History, Retention};
use crate::run::Settings;
use crate::snapshot::{self, Meta, Snapshot, SnapshotId, write_snapshot};

use crate::planning::profile_json;
use crate::tensor::TensorSpec;

/// Checkpoint metadata, without tensor data.
///
/// It owns its fields, so that a thread may write the checkpoint while the tracker goes on.
#[derive(Clone, Debug)]
pub(super) struct CheckpointMeta {
    pub dir: PathBuf,
    pub settings: Settings,
    pub table: TensorRegistry,
    /// Time of the tracker's last call.
    pub clock: u64,
    /// Times of the updates so far; the values are those of the newest.
    pub history: History,
    /// Newest step whose snapshots are, or are being, stored. If it is the newest update, a resume completes them.
    pub stored: Option<u64>,
    /// Id of the run.
    pub run: String,
}

/// Error of a checkpoint, by the stage that failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The averages hold NaN or infinity. Nothing was written, and another try would fail the same way.
    Values(Error),
    /// Files could not be written; another try may succeed.
    Files(Error),
    /// Everything was written, but older snapshots could not be removed.
    Removal(Error),
}

impl Failure {
    pub(super) fn into_error(self) -> Error {
        match self {
            Failure::Values(error) | Failure::Files(error) | Failure::Removal(error) => error,
        }
    }
}

impl CheckpointMeta {
    /// Returns the time of the newest update.
    pub(super) fn step(&self) -> u64 {
        self.history.last().unwrap_or(0)
    }

    /// Stores the live state and a snapshot of every average, then removes surplus snapshots.
    ///
    /// The state comes first: if the process dies before all snapshots are written, a resume writes the rest.
    pub(super) fn store(&self, values: &Values<'_>) -> Result<(), Failure> {
        let dtypes = self.stored_dtypes(values).map_err(Failure::Values)?;
        let average = |(index, dtypes): (usize, &Vec<Dtype>)| self.write_average(values, index, dtypes);
        let averages = || dtypes.iter().enumerate().try_for_each(average);
        self.write_state(values).and_then(|()| averages()).map_err(Failure::Files)?;
        self.drop_surplus().map_err(Failure::Removal)
    }

    /// Stores only the live state.
    pub(super) fn save(&self, values: &Values<'_>) -> Result<()> {
        self.stored_dtypes(values)?;
        self.write_state(values)
    }

    /// Returns the profiles whose snapshot of this step is missing or incomplete.
    pub(super) fn missing(&self) -> Result<Vec<usize>> {
        let there = snapshot::list(&self.dir)?;
        // This library reads shards without their index, but Hugging Face's loaders do not.
        let whole = |stem: SnapshotId, files: &Vec<_>| files.len() == 1 || self.dir.join(stem.index_name()).is_file();
        let missing = |index: &usize| {
            let stem = self.stem(*index);
            !there.get(&stem).is_some_and(|files| whole(stem, files))
        };
        Ok((0..self.settings.profiles.len()).filter(missing).collect())
    }

    /// Stores the snapshots of these profiles, then removes surplus snapshots.
    pub(super) fn complete(&self, values: &Values<'_>, missing: &[usize]) -> Result<()> {
        let dtypes = self.stored_dtypes(values)?;
        let there = snapshot::list(&self.dir)?;
        for &index in missing {
            // Removes shards without an index: a changed shard size may give another number of files.
            if let Some(files) = there.get(&self.stem(index)) {
                snapshot::remove(&self.dir, self.stem(index), files)?;
            }
            self.write_average(values, index, &dtypes[index])?;
        }
        self.drop_surplus()
    }

    fn stem(&self, index: usize) -> SnapshotId {
        SnapshotId { index, step: self.step() }
    }

    /// Returns the stored dtype of each averaged tensor of each profile, after scanning all values.
    fn stored_dtypes(&self, values: &Values<'_>) -> Result<Vec<Vec<Dtype>>> {
        if let Some(dtypes) = values.dtypes {
            return Ok(dtypes.to_vec());
        }
        let layout = self.table.layout();
        let ranges = |averages: &cpu::Averages| -> Vec<cpu::ValueRange> {
            (0..layout.len()).map(|i| cpu::scan(&averages.high[layout.place(i)])).collect()
        };
        self.choose_all_dtypes(values, &values.averages.iter().map(ranges).collect::<Vec<_>>())
    }

    /// Does the same as [`CheckpointMeta::choose_dtypes`] for all profiles.
    pub(super) fn choose_all_dtypes(
        &self,
        values: &Values<'_>,
        ranges: &[Vec<cpu::ValueRange>],
    ) -> Result<Vec<Vec<Dtype>>> {
        let of_profile = |(profile, (averages, ranges)): (usize, (&cpu::Averages, &Vec<cpu::ValueRange>))| {
            let element = |i: usize, element: usize| Ok(averages.high[self.table.layout().place(i)][element]);
            self.choose_dtypes(profile, ranges, element)
        };
        values.averages.iter().zip(ranges).enumerate().map(of_profile).collect()
    }

    /// Chooses the stored dtype of each averaged tensor of a profile by the range of its values.
    ///
    /// That is the requested dtype, or f32 if the requested one cannot hold the values. `value(tensor, element)` looks
    /// up an element.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for a tensor that holds NaN or infinity, and the errors of `value`.
    pub(super) fn choose_dtypes(
        &self,
        profile: usize,
        ranges: &[cpu::ValueRange],
        value: impl Fn(usize, usize) -> Result<f32>,
    ) -> Result<Vec<Dtype>> {
        let mut dtypes = Vec::with_capacity(ranges.len());
        for (i, (entry, range)) in self.table.averaged().iter().zip(ranges).enumerate() {
            if let Some(element) = range.first_not_finite {
                let (tensor, profile) = (entry.name.clone(), self.settings.profiles[profile].to_string());
                return Err(Error::NonFinite {
                    tensor,
                    profile,
                    element,
                    value: value(i, element)?,
                    step: self.step(),
                });
            }
            let dtype = self.wanted_dtype(entry);
            let fits = cpu::max_finite(dtype).is_some_and(|most| f64::from(range.largest) <= most);
            dtypes.push(if fits { dtype } else { Dtype::F32 });
        }
        Ok(dtypes)
    }

    fn wanted_dtype(&self, entry: &Entry) -> Dtype {
        self.settings.checkpoint_dtype.unwrap_or(entry.dtype)
    }

    fn write_average(&self, values: &Values<'_>, index: usize, dtypes: &[Dtype]) -> Result<()> {
        self.warn_of_others(index, dtypes);
        let (averaged, copied) = (self.table.averaged(), self.table.copied());
        let spec = |entry: &Entry, dtype| TensorSpec { name: entry.name.clone(), dtype, shape: entry.shape.clone() };
        let mut specs: Vec<TensorSpec> =
            averaged.iter().zip(dtypes).map(|(entry, &dtype)| spec(entry, dtype)).collect();
        specs.extend(copied.iter().map(|entry| spec(entry, entry.dtype)));
        let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| match i.checked_sub(averaged.len()) {
            Some(copy) => dst.copy_from_slice(&values.copies[copy][range]),
            None => values.store(dst, self.table.layout(), index, i, range, dtypes[i]),
        };
        let meta = self.meta(index, dtypes);
        write_snapshot(&self.dir, self.stem(index), specs, &meta, self.settings.shard_size, &fill)?;
        Ok(())
    }

    /// Warns of each tensor that is kept in another dtype than requested.
    fn warn_of_others(&self, index: usize, dtypes: &[Dtype]) {
        for (entry, &stored) in self.table.averaged().iter().zip(dtypes) {
            let wanted = self.wanted_dtype(entry);
            if stored != wanted {
                let (stem, name) = (self.stem(index), &entry.name);
                tracing::warn!(
                    "snapshot {stem}: tensor `{name}` has values out of range of {wanted} and is stored in {stored}"
                );
            }
        }
    }

    fn meta(&self, index: usize, dtypes: &[Dtype]) -> Meta {
        let entries = self.table.averaged().iter().zip(dtypes);
        let other = entries.filter(|(entry, stored)| entry.dtype != **stored);
        let floats = self.table.copied().iter().filter(|entry| crate::tensor::is_averaged(entry.dtype));
        Meta {
            profile: profile_json(&self.settings.profiles[index]),
            step: self.step(),
            history: Some(serde_json::json!(self.history).to_string()),
            dtypes: other.map(|(entry, _)| (entry.name.clone(), entry.dtype)).collect(),
            copied: floats.map(|entry| entry.name.clone()).collect(),
            run: Some(self.run.clone()),
            tied: self.table.tied().clone(),
        }
    }

    /// Removes the snapshots that retention does not keep. All others, the newest included, are on disk by now.
    ///
    /// Snapshots of other runs, or that cannot be read, are neither counted nor removed, whatever their names.
    pub(super) fn drop_surplus(&self) -> Result<()> {
        let mut there = snapshot::list(&self.dir)?;
        there.retain(|stem, _| self.history.contains(stem.step));
        loop {
            let surplus = self.surplus(&there);
            let of_surplus = || there.iter().filter(|(stem, _)| surplus.contains(&stem.step));
            let odd: BTreeSet<u64> =
                of_surplus().filter(|(stem, files)| !self.is_own(**stem, files)).map(|(stem, _)| stem.step).collect();
            if odd.is_empty() {
                return of_surplus().try_for_each(|(stem, files)| snapshot::remove(&self.dir, *stem, files));
            }
            there.retain(|stem, _| !odd.contains(&stem.step));
        }
    }

    /// Returns the steps to remove; steps that lack a profile's snapshot go first.
    fn surplus(&self, there: &BTreeMap<SnapshotId, Vec<PathBuf>>) -> Vec<u64> {
        let Settings { profiles, retention, max_checkpoints, .. } = &self.settings;
        let steps: BTreeSet<u64> = there.keys().map(|stem| stem.step).collect();
        let whole = |step: u64| (0..profiles.len()).all(|index| there.contains_key(&SnapshotId { index, step }));
        let mut left: Vec<u64> = steps.into_iter().collect();
        let excess =
            if matches!(retention, Retention::Steps(_)) { 0 } else { left.len().saturating_sub(*max_checkpoints) };
        let partial = |step: &u64| Some(step) != left.last() && !whole(*step);
        let mut surplus: Vec<u64> = left.iter().copied().filter(partial).take(excess).collect();
        left.retain(|step| !surplus.contains(step));
        surplus.extend(retention.surplus(profiles, self.history.first().unwrap_or(1), &left, *max_checkpoints));
        surplus
    }

    /// Returns true if a snapshot is readable and belongs to this run; otherwise logs a warning.
    fn is_own(&self, stem: SnapshotId, files: &[PathBuf]) -> bool {
        let why = match Snapshot::open(stem, files) {
            Ok(snapshot) if snapshot.meta.run.as_deref() == Some(&self.run) => return true,
            Ok(_) => "it belongs to another run: move it out of the directory".to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::warn!("{}: retention skips snapshot {stem}: {why}", self.dir.display());
        false
    }
}
