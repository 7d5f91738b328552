//! The checkpoints that some targets read.

use std::collections::{BTreeMap, BTreeSet};

use super::Checkpoints;
use super::plan::{Merge, MergeRow};
use super::products::{ProductAverages, Products};
use crate::checkpoint::{CheckpointModel, first_odd};
use crate::error::{Error, Result};
use crate::synthesis::{ComputedSources, Selection, TensorSource, WeightedSources};

/// Checkpoints that some targets read, by their index.
pub(super) struct MappedModels<'a> {
    models: BTreeMap<usize, &'a CheckpointModel>,
    /// Averages of the products of adapters, if these are asked for.
    products: Option<ProductAverages<'a>>,
}

impl<'a> MappedModels<'a> {
    /// Maps the checkpoints that the targets read. `progress` is called with the bytes of factors whose products are
    /// averaged.
    pub(super) fn new(
        checkpoints: &'a Checkpoints,
        rows: &[&'a MergeRow],
        progress: &'a (dyn Fn(u64) + Sync),
    ) -> MappedModels<'a> {
        let models: BTreeMap<usize, &CheckpointModel> = used(checkpoints, rows).collect();
        let sources = || models.iter().map(|(&i, model)| (i, *model as &dyn TensorSource)).collect();
        let products = checkpoints.products.as_ref();
        let products = products.map(|products| ProductAverages::new(products, rows, sources(), progress));
        MappedModels { models, products }
    }

    /// Computes the errors of all targets' averages of products.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for factors that are not finite.
    pub(super) fn compute_products(&self) -> Result<()> {
        let computed = self.products.iter().try_for_each(|products| products.for_each_group(&mut |_| Ok(())));
        computed.map_err(|error| self.blame(error))
    }

    /// Selects the checkpoints that have a weight in a target.
    pub(super) fn selection(&self, rows: &[&MergeRow]) -> Selection<'_> {
        let has_weight = |i: &usize| rows.iter().any(|row| row.weights[*i] != 0.0);
        let chosen: Vec<usize> = self.models.keys().copied().filter(has_weight).collect();
        let source = |i: usize| self.models[&i] as &dyn TensorSource;
        Selection {
            first: WeightedSources {
                sources: chosen.iter().map(|&i| source(i)).collect(),
                weights: rows.iter().flat_map(|row| chosen.iter().map(|&i| row.weights[i])).collect(),
            },
            newest: rows.iter().map(|row| source(row.newest)).collect(),
            later: Vec::new(),
            computed: self.products.as_ref().map(|products| products as &dyn ComputedSources),
        }
    }

    /// Finds the checkpoint to blame for a tensor that could not be averaged: the first that holds NaN, or an infinity
    /// that another does not hold.
    pub(super) fn blame(&self, error: Error) -> Error {
        let Error::Tensor { tensor, .. } = &error else { return error };
        for model in self.models.values() {
            if let Some((element, value)) = first_odd(model, tensor, self.models.values().copied()) {
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

/// Returns the bytes that one pass over the checkpoints reads: the averaged tensors.
///
/// Merges of other checkpoints count nothing.
pub(super) fn bytes_to_read(checkpoints: &Checkpoints, merges: &[Merge]) -> u64 {
    let rows: Vec<MergeRow> = merges.iter().filter_map(|merge| MergeRow::new(checkpoints, merge).ok()).collect();
    let rows: Vec<&MergeRow> = rows.iter().collect();
    let first = &checkpoints.models[0];
    let factors: BTreeSet<&str> = checkpoints.products.iter().flat_map(Products::factors).collect();
    let of = |counts: &dyn Fn(&str) -> bool| -> u64 {
        first.tensors.iter().filter(|(name, _)| counts(name)).map(|(_, entry)| entry.bytes()).sum()
    };
    let averaged = of(&|name| first.is_averaged(name) && !factors.contains(name));
    let of_factors = of(&|name| factors.contains(name));
    // Averaged products are in f64, and are read for all targets.
    let elements: usize = checkpoints.products.iter().flat_map(Products::elements).sum();
    let mut bytes = (rows.len() * elements * size_of::<f64>()) as u64;
    for (i, _) in used(checkpoints, &rows) {
        if rows.iter().any(|row| row.weights[i] != 0.0) {
            bytes += averaged;
            bytes += of_factors * rows.iter().filter(|row| row.weights[i] != 0.0).count() as u64;
        }
    }
    bytes
}
