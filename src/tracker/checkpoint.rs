//! Storing the live averages as snapshots, and keeping the newest.

use std::collections::BTreeSet;
use std::ops::Range;

use safetensors::Dtype;

use super::PostHocEma;
use super::table::Entry;
use crate::compute::cpu::{self, Averages};
use crate::error::{Error, Result};
use crate::snapshot::{self, Meta, Stem, TensorSpec, write_snapshot};
use crate::synthesis::profile_json;

impl PostHocEma {
    /// Stores the live state and a snapshot of every average, then drops the oldest beyond those to be kept.
    ///
    /// The state comes first: should the process die before all snapshots are written, a resume writes the rest.
    pub(super) fn checkpoint(&mut self) -> Result<()> {
        let dtypes = self.stored_dtypes()?;
        let before = std::mem::replace(&mut self.stored, self.history.last());
        let average = |(index, dtypes): (usize, &Vec<Dtype>)| self.write_average(index, dtypes);
        let written = super::state::write(self).and_then(|()| dtypes.iter().enumerate().try_for_each(average));
        self.pending = written.is_err();
        if written.is_err() {
            self.stored = before;
        }
        written?;
        self.drop_oldest()
    }

    /// Tries once more to store what could not be stored, before the averages move on.
    pub(super) fn retry(&mut self) {
        if !self.pending {
            return;
        }
        if let Err(error) = self.checkpoint() {
            tracing::warn!("the snapshot of step {} is given up: {error}", self.history.last().unwrap_or(0));
            self.pending = false;
        }
    }

    /// Writes what a process that died left unwritten of its last checkpoint.
    pub(super) fn complete(&mut self) -> Result<()> {
        if self.stored.is_none() || self.stored != self.history.last() {
            return Ok(());
        }
        let there = snapshot::list(&self.dir)?;
        // Shards without their index are read here, but not by Hugging Face's loaders.
        let whole = |stem: Stem, files: &Vec<_>| files.len() == 1 || self.dir.join(stem.index_name()).is_file();
        let missing = |index: &usize| {
            let stem = self.stem(*index);
            !there.get(&stem).is_some_and(|files| whole(stem, files))
        };
        let missing: Vec<usize> = (0..self.averages.len()).filter(missing).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let dtypes = self.stored_dtypes()?;
        missing.into_iter().try_for_each(|index| self.write_average(index, &dtypes[index]))?;
        self.drop_oldest()
    }

    /// Stores the live state, so that a resume goes on from here; no snapshot is written.
    ///
    /// To be called wherever the training's own checkpoints are saved.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where an average holds NaN or infinity, [`Error::Io`]; the state that was stored before is
    /// then untouched.
    pub fn save(&self) -> Result<()> {
        self.stored_dtypes()?;
        super::state::write(self)
    }

    /// Ends the run: stores a snapshot of the newest update where there is none yet, and the live state.
    ///
    /// # Errors
    /// As [`PostHocEma::update`]; it can then be called again.
    pub fn finish(&mut self) -> Result<()> {
        if self.history.is_empty() {
            return Ok(());
        }
        if self.stored == self.history.last() { self.save() } else { self.checkpoint() }
    }

    fn stem(&self, index: usize) -> Stem {
        Stem { index, step: self.history.last().unwrap_or(0) }
    }

    /// The dtype that each averaged tensor of each profile is stored in, after a look at all values.
    fn stored_dtypes(&self) -> Result<Vec<Vec<Dtype>>> {
        let of_profile = |(index, averages): (usize, &Averages)| {
            let entries = self.table.averaged().iter().enumerate();
            entries.map(|(i, entry)| self.stored_dtype(index, averages, i, entry)).collect()
        };
        self.averages.iter().enumerate().map(of_profile).collect()
    }

    fn stored_dtype(&self, index: usize, averages: &Averages, i: usize, entry: &Entry) -> Result<Dtype> {
        let values = &averages.high[self.table.layout().place(i)];
        let range = cpu::scan(values);
        let step = self.history.last().unwrap_or(0);
        if let Some(element) = range.first_not_finite {
            let (tensor, profile) = (entry.name.clone(), self.settings.profiles[index].to_string());
            return Err(Error::NonFinite { tensor, profile, element, value: values[element], step });
        }
        let dtype = self.settings.checkpoint_dtype.unwrap_or(entry.dtype);
        let fits = cpu::max_finite(dtype).is_some_and(|most| f64::from(range.largest) <= most);
        Ok(if fits { dtype } else { Dtype::F32 })
    }

    fn write_average(&self, index: usize, dtypes: &[Dtype]) -> Result<()> {
        let (averaged, copied) = (self.table.averaged(), self.table.copied());
        for (entry, &stored) in averaged.iter().zip(dtypes) {
            let wanted = self.settings.checkpoint_dtype.unwrap_or(entry.dtype);
            if stored != wanted {
                let stem = self.stem(index);
                tracing::warn!(
                    "snapshot {stem}: tensor `{}` holds values beyond {wanted} and is kept in {stored}",
                    entry.name
                );
            }
        }
        let spec = |entry: &Entry, dtype| TensorSpec { name: entry.name.clone(), dtype, shape: entry.shape.clone() };
        let mut specs: Vec<TensorSpec> =
            averaged.iter().zip(dtypes).map(|(entry, &dtype)| spec(entry, dtype)).collect();
        specs.extend(copied.iter().map(|entry| spec(entry, entry.dtype)));
        let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| match i.checked_sub(averaged.len()) {
            Some(copy) => dst.copy_from_slice(&self.copies[copy][range]),
            None => {
                let (start, size) = (self.table.layout().place(i).start, dtypes[i].bitsize() / 8);
                let place = start + range.start / size..start + range.end / size;
                self.averages[index].store(dst, place, dtypes[i]);
            }
        };
        let meta = self.meta(index, dtypes);
        write_snapshot(&self.dir, self.stem(index), specs, &meta, self.settings.shard_size, &fill)?;
        Ok(())
    }

    fn meta(&self, index: usize, dtypes: &[Dtype]) -> Meta {
        let entries = self.table.averaged().iter().zip(dtypes);
        let other = entries.filter(|(entry, stored)| entry.dtype != **stored);
        let floats = self.table.copied().iter().filter(|entry| crate::tensor::is_averaged(entry.dtype));
        Meta {
            profile: profile_json(&self.settings.profiles[index]),
            step: self.history.last().unwrap_or(0),
            history: Some(serde_json::json!(self.history).to_string()),
            dtypes: other.map(|(entry, _)| (entry.name.clone(), entry.dtype)).collect(),
            copied: floats.map(|entry| entry.name.clone()).collect(),
            run: Some(self.run.clone()),
            tied: self.table.tied().clone(),
        }
    }

    /// Removes the snapshots of the oldest steps beyond those to be kept.
    fn drop_oldest(&self) -> Result<()> {
        let there = snapshot::list(&self.dir)?;
        let steps: BTreeSet<u64> = there.keys().map(|stem| stem.step).collect();
        let excess = steps.len().saturating_sub(self.settings.max_checkpoints);
        for step in steps.into_iter().take(excess) {
            for (stem, files) in there.iter().filter(|(stem, _)| stem.step == step) {
                snapshot::remove(&self.dir, *stem, files)?;
            }
        }
        Ok(())
    }
}
