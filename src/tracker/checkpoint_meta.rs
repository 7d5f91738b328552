//! Checkpoint of a run at one update: the live state, a snapshot of every average, and retention.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::registry::{Entry, TensorRegistry};
use super::shard_place::ShardNumber;
use super::values::Values;
use crate::compute::cpu::{self, Averages, Layout};
use crate::error::{Error, Result, shown};
use crate::fs::LockId;
use crate::math::{History, Retention};
use crate::planning::profile_json;
use crate::run::Settings;
use crate::snapshot::{self, Extension, Meta, PartPlace, Session, Snapshot, SnapshotId, write_part, write_snapshot};
use crate::tensor::{TensorSpec, is_averaged};

/// Checkpoint metadata, without tensor data.
///
/// It owns its fields, so that a thread may write the checkpoint while the tracker goes on.
#[derive(Clone, Debug)]
pub(super) struct CheckpointMeta {
    pub dir: PathBuf,
    pub settings: Settings,
    pub registry: TensorRegistry,
    /// Time of the tracker's last call.
    pub clock: u64,
    /// Times of the updates so far; the values are those of the newest.
    pub history: History,
    /// Newest step whose snapshots are, or are being, stored. If it is the newest update, a resume completes them.
    pub stored: Option<u64>,
    pub run_id: String,
    /// Session that every file of the checkpoint carries.
    pub session: Option<Session>,
    /// Changes of the run's tensors, the oldest first.
    pub extensions: Vec<Extension>,
    /// Sessions before it that led to these averages.
    pub lineage: Vec<Session>,
    /// Number of this process in a sharded run.
    pub shard: Option<ShardNumber>,
    /// Steps whose snapshots a sharded run keeps.
    pub kept: BTreeSet<u64>,
    /// Time of the last call in the live state that a resume went on from.
    pub resumed_at: Option<u64>,
    /// Lock of the run, which is checked before every file.
    pub lock: LockId,
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

    fn snapshot_id(&self, index: usize) -> SnapshotId {
        SnapshotId { index, step: self.step() }
    }

    /// Stores the live state and a snapshot of every average, then removes surplus snapshots.
    pub(super) fn store(&self, values: &Values<'_>) -> Result<(), Failure> {
        if self.stores_nothing() {
            return Ok(());
        }
        let dtypes = self.stored_dtypes(values).map_err(Failure::Values)?;
        self.write_files(values, &dtypes).map_err(Failure::Files)?;
        let removed = self.remove_older_states().and_then(|()| self.remove_left_course());
        removed.and_then(|()| self.drop_surplus()).map_err(Failure::Removal)
    }

    /// Writes the state first: if the process dies before all snapshots are written, a resume writes the rest.
    fn write_files(&self, values: &Values<'_>, dtypes: &[Vec<Dtype>]) -> Result<()> {
        self.write_state(values)?;
        for (index, dtypes) in dtypes.iter().enumerate() {
            self.write_average(values, index, dtypes)?;
        }
        Ok(())
    }

    /// Stores only the live state.
    pub(super) fn save(&self, values: &Values<'_>) -> Result<()> {
        if self.stores_nothing() {
            return Ok(());
        }
        self.stored_dtypes(values)?;
        self.write_state(values)?;
        self.remove_older_states()
    }

    /// Stores the live state in a file of the caller's.
    pub(super) fn save_to(&self, path: &Path, values: &Values<'_>) -> Result<()> {
        self.stored_dtypes(values)?;
        self.write_state_to(path, values)
    }

    /// Returns the profiles whose snapshot of this step is missing or incomplete.
    pub(super) fn missing(&self) -> Result<Vec<usize>> {
        let on_disk = snapshot::list(&self.dir)?;
        let is_missing = |index: &usize| {
            let id = self.snapshot_id(*index);
            !on_disk.get(&id).is_some_and(|files| self.is_complete(id, files))
        };
        Ok((0..self.settings.profiles.len()).filter(is_missing).collect())
    }

    /// Returns true if a snapshot is one file or has an index of its shards.
    ///
    /// This library reads shards without their index, but Hugging Face's loaders do not.
    fn is_complete(&self, id: SnapshotId, files: &[PathBuf]) -> bool {
        let is_set = files.first().is_some_and(|file| file.ends_with(id.part_name(1, files.len())));
        is_set || files.len() == 1 || self.dir.join(id.index_name()).is_file()
    }

    /// Stores the snapshots of these profiles, then removes surplus snapshots.
    pub(super) fn complete(&self, values: &Values<'_>, missing: &[usize]) -> Result<()> {
        let dtypes = self.stored_dtypes(values)?;
        if self.shard.is_some() {
            return missing.iter().try_for_each(|&index| self.write_average(values, index, &dtypes[index]));
        }
        let on_disk = snapshot::list(&self.dir)?;
        for &index in missing {
            // Removes shards without an index: a changed shard size may give another number of files.
            if let Some(files) = on_disk.get(&self.snapshot_id(index)) {
                snapshot::remove(&self.dir, self.snapshot_id(index), files)?;
            }
            self.write_average(values, index, &dtypes[index])?;
        }
        self.drop_surplus()
    }

    /// Returns the stored dtype of each averaged tensor of each profile, after scanning all values.
    fn stored_dtypes(&self, values: &Values<'_>) -> Result<Vec<Vec<Dtype>>> {
        if let Some(dtypes) = values.dtypes {
            return Ok(dtypes.to_vec());
        }
        let layout = self.registry.layout();
        let ranges: Vec<_> = values.averages.iter().map(|averages| scan(averages, layout)).collect();
        self.choose_dtypes(values, &ranges)
    }

    /// Chooses the stored dtype of each averaged tensor of each profile by the range of its values.
    ///
    /// That is the requested dtype, or f32 if the requested one cannot hold the values.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for a tensor that holds NaN or infinity.
    pub(super) fn choose_dtypes(
        &self,
        values: &Values<'_>,
        ranges: &[Vec<cpu::ValueRange>],
    ) -> Result<Vec<Vec<Dtype>>> {
        let averages = values.averages.iter().zip(ranges).enumerate();
        averages.map(|(profile, (averages, ranges))| self.dtypes_of(profile, averages, ranges)).collect()
    }

    fn dtypes_of(&self, profile: usize, averages: &Averages, ranges: &[cpu::ValueRange]) -> Result<Vec<Dtype>> {
        let mut dtypes = Vec::with_capacity(ranges.len());
        for (i, (entry, range)) in self.registry.averaged().iter().zip(ranges).enumerate() {
            if let Some(element) = range.first_not_finite {
                return Err(Error::NonFinite {
                    tensor: entry.name.clone(),
                    profile: self.settings.profiles[profile].to_string(),
                    element,
                    value: averages.high[self.registry.layout().range(i)][element],
                    step: self.step(),
                });
            }
            let dtype = self.requested_dtype(entry);
            let fits = cpu::max_finite(dtype).is_some_and(|most| f64::from(range.largest) <= most);
            dtypes.push(if fits { dtype } else { Dtype::F32 });
        }
        Ok(dtypes)
    }

    fn requested_dtype(&self, entry: &Entry) -> Dtype {
        self.settings.checkpoint_dtype.unwrap_or(entry.dtype)
    }

    fn write_average(&self, values: &Values<'_>, index: usize, dtypes: &[Dtype]) -> Result<()> {
        self.lock.check()?;
        self.warn_of_other_dtypes(index, dtypes);
        let averaged = self.registry.averaged();
        let copied = self.registry.copied();
        let layout = self.registry.layout();
        // Tensors that this process stores, by their place among all: those that are averaged first.
        let entries: Vec<&Entry> = averaged.iter().chain(copied).collect();
        let stored: Vec<usize> = (0..entries.len()).filter(|&i| entries[i].is_stored).collect();
        let dtype_of = |i: usize| dtypes.get(i).copied().unwrap_or(entries[i].dtype);
        let specs: Vec<TensorSpec> =
            stored.iter().map(|&i| TensorSpec { dtype: dtype_of(i), ..entries[i].spec() }).collect();
        let fill = |place: usize, range: Range<usize>, dst: &mut [u8]| match stored[place].checked_sub(averaged.len()) {
            Some(copy) => dst.copy_from_slice(&values.copies[copy][range]),
            None => {
                let i = stored[place];
                let start = layout.range(i).start;
                let size = dtypes[i].bitsize() / 8;
                values.averages[index].store(dst, start + range.start / size..start + range.end / size, dtypes[i]);
            }
        };
        let (id, meta) = (self.snapshot_id(index), self.snapshot_meta(index, dtypes));
        let Some(shard) = self.shard else {
            return write_snapshot(&self.dir, id, specs, &meta, self.settings.shard_size, &fill).map(drop);
        };
        let places: Vec<PartPlace> = stored.iter().map(|&i| entries[i].place()).collect();
        write_part(&self.dir.join(shard.snapshot_name(id)), specs, &places, meta.to_strings(), &fill)
    }

    /// Warns of each tensor that is stored in another dtype than requested.
    fn warn_of_other_dtypes(&self, index: usize, dtypes: &[Dtype]) {
        let id = self.snapshot_id(index);
        for (entry, &stored) in self.registry.averaged().iter().zip(dtypes) {
            let requested = self.requested_dtype(entry);
            if stored != requested {
                let name = shown(&entry.name);
                tracing::warn!(
                    "snapshot {id}: tensor `{name}` has values out of range of {requested} and is stored in {stored}"
                );
            }
        }
    }

    fn snapshot_meta(&self, index: usize, dtypes: &[Dtype]) -> Meta {
        let averaged = self.registry.averaged().iter().zip(dtypes).filter(|(entry, _)| entry.is_stored);
        let converted = averaged.filter(|(entry, stored)| entry.dtype != **stored);
        let copied = self.registry.copied().iter().filter(|entry| entry.is_stored);
        let copied_floats = copied.filter(|entry| is_averaged(entry.dtype));
        Meta {
            profile: profile_json(&self.settings.profiles[index]),
            step: self.step(),
            history: Some(serde_json::json!(self.history).to_string()),
            dtypes: converted.map(|(entry, _)| (entry.name.clone(), entry.dtype)).collect(),
            copied: copied_floats.map(|entry| entry.name.clone()).collect(),
            run: Some(self.run_id.clone()),
            session: self.session.clone(),
            tied: self.registry.stored_ties(),
            extensions: self.extensions.clone(),
        }
    }

    /// Removes the snapshots that retention does not keep. All others, the newest included, are on disk by now.
    ///
    /// Snapshots of other runs, or that cannot be read, are neither counted nor removed, whatever their names.
    pub(super) fn drop_surplus(&self) -> Result<()> {
        if self.shard.is_some() {
            return self.drop_shared_surplus();
        }
        self.lock.check()?;
        let mut on_disk = snapshot::list(&self.dir)?;
        on_disk.retain(|id, _| self.history.contains(id.step));
        loop {
            let steps = self.surplus_steps(&on_disk);
            let surplus: Vec<_> = on_disk.iter().filter(|(id, _)| steps.contains(&id.step)).collect();
            let foreign = surplus.iter().filter(|(id, files)| !self.is_own(**id, files));
            let foreign: BTreeSet<u64> = foreign.map(|(id, _)| id.step).collect();
            if foreign.is_empty() {
                return surplus.into_iter().try_for_each(|(id, files)| snapshot::remove(&self.dir, *id, files));
            }
            on_disk.retain(|id, _| !foreign.contains(&id.step));
        }
    }

    /// Returns the steps to remove; steps that lack a profile's snapshot go first.
    fn surplus_steps(&self, on_disk: &BTreeMap<SnapshotId, Vec<PathBuf>>) -> Vec<u64> {
        let Settings { profiles, retention, max_checkpoints, .. } = &self.settings;
        let steps: BTreeSet<u64> = on_disk.keys().map(|id| id.step).collect();
        let mut kept: Vec<u64> = steps.into_iter().collect();
        let newest = kept.last().copied();
        let excess = match retention {
            Retention::Steps(_) => 0,
            _ => kept.len().saturating_sub(*max_checkpoints),
        };
        let has_all_profiles =
            |step: u64| (0..profiles.len()).all(|index| on_disk.contains_key(&SnapshotId { index, step }));
        let incomplete = kept.iter().copied().filter(|&step| Some(step) != newest && !has_all_profiles(step));
        let mut surplus: Vec<u64> = incomplete.take(excess).collect();
        kept.retain(|step| !surplus.contains(step));
        surplus.extend(retention.surplus(profiles, self.history.first().unwrap_or(1), &kept, *max_checkpoints));
        surplus
    }

    /// Returns true if a snapshot is readable and belongs to this run; otherwise logs a warning.
    fn is_own(&self, id: SnapshotId, files: &[PathBuf]) -> bool {
        let why = match Snapshot::open(id, files) {
            Ok(snapshot) if snapshot.meta.run.as_deref() == Some(&self.run_id) => return true,
            Ok(_) => "it belongs to another run: move it out of the directory".to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::warn!("{}: retention skips snapshot {id}: {why}", shown(&self.dir));
        false
    }
}

/// Returns the range of the values of each tensor.
fn scan(averages: &Averages, layout: &Layout) -> Vec<cpu::ValueRange> {
    (0..layout.len()).map(|i| cpu::scan(&averages.high[layout.range(i)])).collect()
}
