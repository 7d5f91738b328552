//! The checkpoints that some targets read, all of them mapped.

use std::collections::BTreeMap;
use std::path::Path;

use tempfile::TempDir;

use super::Checkpoints;
use super::model::Model;
use super::plan::{Merge, Row, row};
use crate::error::{Error, Result};
use crate::fs::TempLock;
#[cfg(feature = "pytorch")]
use crate::fs::scratch_folder;
use crate::synthesis::{Selection, TensorSource};
use crate::tensor::first_non_finite;

/// The models that some targets read.
pub(super) struct Mapped<'a> {
    models: BTreeMap<usize, &'a Model>,
    /// Those that could not be mapped, in files that can.
    converted: BTreeMap<usize, Model>,
    /// Where these files are.
    _scratch: Option<(TempDir, TempLock)>,
}

impl<'a> Mapped<'a> {
    /// Maps what the targets read. Files of PyTorch are converted for that, tensor by tensor, in a temporary folder in
    /// `scratch`, or else among the system's temporary files.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), and [`Error::Damaged`](crate::Error::Damaged) for elements that cannot be read.
    pub(super) fn new(
        checkpoints: &'a Checkpoints,
        rows: &[&Row],
        scratch: Option<&Path>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Mapped<'a>> {
        let models: BTreeMap<usize, &Model> = used(checkpoints, rows).collect();
        let mut mapped = Mapped { models, converted: BTreeMap::new(), _scratch: None };
        if mapped.models.values().any(|model| !model.is_mapped()) {
            mapped.convert(scratch, progress)?;
        }
        Ok(mapped)
    }

    #[cfg(feature = "pytorch")]
    fn convert(&mut self, scratch: Option<&Path>, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        let parent = scratch.map_or_else(std::env::temp_dir, Path::to_owned);
        let (temp, held) = scratch_folder(&parent, "average").map_err(Error::io("write", &parent))?;
        for (&i, model) in self.models.iter().filter(|(_, model)| !model.is_mapped()) {
            self.converted.insert(i, super::convert::convert(model, &temp.path().join(i.to_string()), progress)?);
        }
        self._scratch = Some((temp, held));
        Ok(())
    }

    /// Without the feature, no such file is ever opened.
    #[cfg(not(feature = "pytorch"))]
    fn convert(&mut self, _: Option<&Path>, _: &(dyn Fn(u64) + Sync)) -> Result<()> {
        Ok(())
    }

    /// What the targets are blended from: all of them at or before the targets' times that have a weight.
    pub(super) fn selection(&self, rows: &[&Row]) -> Selection<'_> {
        let weighty = |i: &usize| rows.iter().any(|row| row.weights[*i] != 0.0);
        let chosen: Vec<usize> = self.models.keys().copied().filter(weighty).collect();
        let holder = |i: usize| self.converted.get(&i).unwrap_or_else(|| self.models[&i]) as &dyn TensorSource;
        Selection {
            holders: chosen.iter().map(|&i| holder(i)).collect(),
            weights: rows.iter().flat_map(|row| chosen.iter().map(|&i| row.weights[i])).collect(),
            newest: rows.iter().map(|row| holder(row.newest)).collect(),
        }
    }
}

impl Mapped<'_> {
    /// Finds the checkpoint to blame for a tensor that could not be averaged: one that holds what is not finite.
    pub(super) fn blame(&self, error: Error) -> Error {
        let Error::Tensor { tensor, .. } = &error else { return error };
        for (i, model) in &self.models {
            let mapped = self.converted.get(i).unwrap_or(model);
            let stored = mapped.stored(tensor).and_then(|(dtype, elements)| Some((dtype, elements.host()?)));
            if let Some((element, value)) = stored.and_then(|(dtype, bytes)| first_non_finite(dtype, bytes)) {
                let why = format!(
                    "tensor `{tensor}` holds {value} at element {element}, and so would every average of it: leave this \
                     checkpoint out"
                );
                return Error::unexpected(&model.input.path, why);
            }
        }
        error
    }
}

/// The checkpoints that have a weight in a target, or are copied from.
fn used<'a>(checkpoints: &'a Checkpoints, rows: &[&Row]) -> impl Iterator<Item = (usize, &'a Model)> {
    let used = |i: usize| rows.iter().any(|row| row.newest == i || row.weights[i] != 0.0);
    checkpoints.models.iter().enumerate().filter(move |(i, _)| used(*i))
}

/// The bytes of averaged tensors, and once more what must be converted; nothing for merges of other checkpoints.
pub(super) fn bytes_to_read(checkpoints: &Checkpoints, merges: &[Merge]) -> u64 {
    let rows: Vec<Row> = merges.iter().filter_map(|merge| row(checkpoints, merge).ok()).collect();
    let rows: Vec<&Row> = rows.iter().collect();
    let bytes = |all: bool| -> u64 {
        let first = &checkpoints.models[0];
        first.tensors.iter().filter(|(name, _)| all || first.is_averaged(name)).map(|(_, held)| held.bytes()).sum()
    };
    let (averaged, all) = (bytes(false), bytes(true));
    let each = |(i, model): (usize, &Model)| {
        let blended = rows.iter().any(|row| row.weights[i] != 0.0);
        averaged * u64::from(blended) + all * u64::from(!model.is_mapped())
    };
    used(checkpoints, &rows).map(each).sum()
}
