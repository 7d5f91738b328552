//! The checkpoints that some targets read, all of them mapped.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use tempfile::TempDir;

use super::Checkpoints;
use super::plan::{Merge, MergeRow};
use crate::checkpoint::CheckpointModel;
use crate::error::{Error, Result};
use crate::fs::TempLock;
#[cfg(feature = "pytorch")]
use crate::fs::scratch_folder;
use crate::snapshot::StoredFile;
use crate::synthesis::{Elements, Selection, TensorSource, WeightedSources};
use crate::tensor::first_non_finite;

/// Checkpoints that some targets read, by their index.
pub(super) struct MappedModels<'a> {
    models: BTreeMap<usize, MappedModel<'a>>,
    /// Folder of the gathered tensors.
    _scratch: Option<(TempDir, TempLock)>,
}

/// Checkpoint, all of whose tensors are mapped in C order.
struct MappedModel<'a> {
    model: &'a CheckpointModel,
    /// Tensors that the checkpoint's own files do not hold in C order.
    gathered: Option<StoredFile>,
}

impl TensorSource for MappedModel<'_> {
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        let gathered = || {
            let file = self.gathered.as_ref()?;
            let tensor = file.tensors().get(name)?;
            Some((tensor.dtype, Elements::Host(file.bytes(tensor))))
        };
        self.model.stored(name).or_else(gathered)
    }

    fn will_need(&self, bytes: &[u8]) {
        self.model.will_need(bytes);
        self.gathered.iter().for_each(|file| file.will_need(bytes));
    }
}

impl<'a> MappedModels<'a> {
    /// Maps the checkpoints that the targets read.
    ///
    /// Tensors that a PyTorch file does not hold in C order are gathered first, one by one, in a temporary folder in
    /// `scratch`, or else among the system's temporary files.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn new(
        checkpoints: &'a Checkpoints,
        rows: &[&MergeRow],
        scratch: Option<&Path>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<MappedModels<'a>> {
        let models = used(checkpoints, rows).map(|(i, model)| (i, MappedModel { model, gathered: None })).collect();
        let mut mapped = MappedModels { models, _scratch: None };
        if mapped.models.values().any(|mapped| mapped.model.scattered().next().is_some()) {
            mapped.gather(scratch, progress)?;
        }
        Ok(mapped)
    }

    #[cfg(feature = "pytorch")]
    fn gather(&mut self, scratch: Option<&Path>, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        let parent = scratch.map_or_else(std::env::temp_dir, Path::to_owned);
        let (temp, lock) = scratch_folder(&parent, "average").map_err(Error::io("write", &parent))?;
        for (i, mapped) in self.models.iter_mut().filter(|(_, mapped)| mapped.model.scattered().next().is_some()) {
            let path = temp.path().join(format!("{i}.safetensors"));
            mapped.gathered = Some(super::gather::gather(mapped.model, &path, progress)?);
        }
        self._scratch = Some((temp, lock));
        Ok(())
    }

    /// Does nothing: without the feature, all files hold their tensors in C order.
    #[cfg(not(feature = "pytorch"))]
    fn gather(&mut self, _: Option<&Path>, _: &(dyn Fn(u64) + Sync)) -> Result<()> {
        Ok(())
    }

    /// Selects the checkpoints that have a weight in a target.
    pub(super) fn selection(&self, rows: &[&MergeRow]) -> Selection<'_> {
        let has_weight = |i: &usize| rows.iter().any(|row| row.weights[*i] != 0.0);
        let chosen: Vec<usize> = self.models.keys().copied().filter(has_weight).collect();
        let source = |i: usize| &self.models[&i] as &dyn TensorSource;
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
        for mapped in self.models.values() {
            if let Some((dtype, elements)) = mapped.stored(tensor)
                && let Some(bytes) = elements.host()
                && let Some((element, value)) = first_non_finite(dtype, bytes)
            {
                let why = format!(
                    "tensor `{tensor}` holds {value} at element {element}, and so would every average of it: leave \
                     this checkpoint out"
                );
                return Error::unexpected(&mapped.model.found.path, why);
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

/// Returns the bytes that one pass over the checkpoints reads: the averaged tensors, and once more all that are
/// gathered.
///
/// Merges of other checkpoints count nothing.
pub(super) fn bytes_to_read(checkpoints: &Checkpoints, merges: &[Merge]) -> u64 {
    let rows: Vec<MergeRow> = merges.iter().filter_map(|merge| MergeRow::new(checkpoints, merge).ok()).collect();
    let rows: Vec<&MergeRow> = rows.iter().collect();
    let first = &checkpoints.models[0];
    let averaged: u64 =
        first.tensors.iter().filter(|(name, _)| first.is_averaged(name)).map(|(_, entry)| entry.bytes()).sum();
    let mut bytes = 0;
    for (i, model) in used(checkpoints, &rows) {
        if rows.iter().any(|row| row.weights[i] != 0.0) {
            bytes += averaged;
        }
        bytes += model.scattered().map(|(_, entry)| entry.bytes()).sum::<u64>();
    }
    bytes
}
