//! The checkpoints that some targets read, all of them mapped.

use std::collections::BTreeMap;
use std::path::Path;

use tempfile::TempDir;

use super::Checkpoints;
use super::model::CheckpointModel;
use super::plan::{Merge, MergeRow};
use crate::error::{Error, Result};
use crate::fs::TempLock;
#[cfg(feature = "pytorch")]
use crate::fs::scratch_folder;
use crate::synthesis::{Selection, TensorSource, WeightedSources};
use crate::tensor::first_non_finite;

/// Checkpoints that some targets read, by their index.
pub(super) struct MappedModels<'a> {
    models: BTreeMap<usize, &'a CheckpointModel>,
    /// Copies, in files that can be mapped, of those checkpoints whose own cannot.
    converted: BTreeMap<usize, CheckpointModel>,
    /// Folder of the copies.
    _scratch: Option<(TempDir, TempLock)>,
}

impl<'a> MappedModels<'a> {
    /// Maps the checkpoints that the targets read.
    ///
    /// PyTorch files are converted first, tensor by tensor, in a temporary folder in `scratch`, or else among the
    /// system's temporary files.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Damaged`] for elements that cannot be read.
    pub(super) fn new(
        checkpoints: &'a Checkpoints,
        rows: &[&MergeRow],
        scratch: Option<&Path>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<MappedModels<'a>> {
        let models: BTreeMap<usize, &CheckpointModel> = used(checkpoints, rows).collect();
        let mut mapped = MappedModels { models, converted: BTreeMap::new(), _scratch: None };
        if mapped.models.values().any(|model| !model.is_mapped()) {
            mapped.convert(scratch, progress)?;
        }
        Ok(mapped)
    }

    #[cfg(feature = "pytorch")]
    fn convert(&mut self, scratch: Option<&Path>, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        let parent = scratch.map_or_else(std::env::temp_dir, Path::to_owned);
        let (temp, lock) = scratch_folder(&parent, "average").map_err(Error::io("write", &parent))?;
        for (&i, model) in self.models.iter().filter(|(_, model)| !model.is_mapped()) {
            let dir = temp.path().join(i.to_string());
            self.converted.insert(i, super::convert::convert(model, &dir, progress)?);
        }
        self._scratch = Some((temp, lock));
        Ok(())
    }

    /// Does nothing: without the feature, no PyTorch file is ever opened.
    #[cfg(not(feature = "pytorch"))]
    fn convert(&mut self, _: Option<&Path>, _: &(dyn Fn(u64) + Sync)) -> Result<()> {
        Ok(())
    }

    /// Returns the mapped form of a checkpoint.
    fn mapped(&self, index: usize) -> &CheckpointModel {
        self.converted.get(&index).unwrap_or_else(|| self.models[&index])
    }

    /// Selects the checkpoints that have a weight in a target.
    pub(super) fn selection(&self, rows: &[&MergeRow]) -> Selection<'_> {
        let has_weight = |i: &usize| rows.iter().any(|row| row.weights[*i] != 0.0);
        let chosen: Vec<usize> = self.models.keys().copied().filter(has_weight).collect();
        let source = |i: usize| self.mapped(i) as &dyn TensorSource;
        Selection {
            first: WeightedSources {
                sources: chosen.iter().map(|&i| source(i)).collect(),
                weights: rows.iter().flat_map(|row| chosen.iter().map(|&i| row.weights[i])).collect(),
            },
            newest: rows.iter().map(|row| source(row.newest)).collect(),
            later: Vec::new(),
        }
    }

    /// Finds the checkpoint to blame for a tensor that could not be averaged: the first that holds NaN or an infinity.
    pub(super) fn blame(&self, error: Error) -> Error {
        let Error::Tensor { tensor, .. } = &error else { return error };
        for (&i, model) in &self.models {
            if let Some((dtype, elements)) = self.mapped(i).stored(tensor)
                && let Some(bytes) = elements.host()
                && let Some((element, value)) = first_non_finite(dtype, bytes)
            {
                let why = format!(
                    "tensor `{tensor}` holds {value} at element {element}, and so would every average of it: leave \
                     this checkpoint out"
                );
                return Error::unexpected(&model.found.path, why);
            }
        }
        error
    }
}

/// Iterates over the checkpoints that have a weight in a target, or from which tensors are copied.
fn used<'a>(checkpoints: &'a Checkpoints, rows: &[&MergeRow]) -> impl Iterator<Item = (usize, &'a CheckpointModel)> {
    let is_used = |i: usize| rows.iter().any(|row| row.newest == i || row.weights[i] != 0.0);
    checkpoints.models.iter().enumerate().filter(move |(i, _)| is_used(*i))
}

/// Returns the bytes that one pass over the checkpoints reads: the averaged tensors, and once more all that is
/// converted.
///
/// Merges of other checkpoints count nothing.
pub(super) fn bytes_to_read(checkpoints: &Checkpoints, merges: &[Merge]) -> u64 {
    let rows: Vec<MergeRow> = merges.iter().filter_map(|merge| MergeRow::new(checkpoints, merge).ok()).collect();
    let rows: Vec<&MergeRow> = rows.iter().collect();
    let mut averaged = 0;
    let mut all = 0;
    let first = &checkpoints.models[0];
    for (name, entry) in &first.tensors {
        all += entry.bytes();
        if first.is_averaged(name) {
            averaged += entry.bytes();
        }
    }
    let mut bytes = 0;
    for (i, model) in used(checkpoints, &rows) {
        if rows.iter().any(|row| row.weights[i] != 0.0) {
            bytes += averaged;
        }
        if !model.is_mapped() {
            bytes += all;
        }
    }
    bytes
}
