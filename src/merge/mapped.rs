//! The checkpoints that some targets read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Checkpoints;
use super::plan::{Merge, MergeRow};
use super::products::{AveragedProducts, Products};
use crate::checkpoint::{CheckpointModel, first_odd};
use crate::error::{Error, Result};
use crate::synthesis::{LaterSelection, Selection, TensorSource, WeightedSources};

/// Checkpoints that some targets read, by their index.
pub(super) struct MappedModels<'a> {
    models: BTreeMap<usize, &'a CheckpointModel>,
    /// Averaged products of adapters, for each target.
    products: Vec<Arc<AveragedProducts>>,
    /// Names of the factors of these.
    factors: BTreeSet<String>,
}

impl<'a> MappedModels<'a> {
    /// Maps the checkpoints that the targets read, and averages the products of adapters if these are asked for.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for factors that are not finite.
    pub(super) fn new(
        checkpoints: &'a Checkpoints,
        rows: &[&MergeRow],
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<MappedModels<'a>> {
        let models = used(checkpoints, rows).collect();
        let mut mapped = MappedModels { models, products: Vec::new(), factors: BTreeSet::new() };
        if let Some(products) = &checkpoints.products {
            let sources = mapped.models.iter().map(|(&i, model)| (i, *model as &dyn TensorSource)).collect();
            let averaged: Result<_> = rows.iter().map(|row| products.average(row, &sources, progress)).collect();
            mapped.products = averaged.map_err(|error| mapped.blame(error))?;
            mapped.factors = products.factors().map(str::to_owned).collect();
        }
        Ok(mapped)
    }

    /// Returns the averaged products of adapters, for each target; none if factors are averaged.
    pub(super) fn products(&self) -> &[Arc<AveragedProducts>] {
        &self.products
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
            later: self.factors_of_products().into_iter().collect(),
        }
    }

    /// Returns the factors of averaged products as sources with weights of their own: 1 for the target's.
    fn factors_of_products(&self) -> Option<LaterSelection<'_>> {
        let targets = 0..self.products.len();
        let weight = |target, source| if target == source { 1.0 } else { 0.0 };
        let weights = targets.clone().flat_map(|i| targets.clone().map(move |j| weight(i, j))).collect();
        let sources = self.products.iter().map(|products| products.as_ref() as &dyn TensorSource).collect();
        let weighted = WeightedSources { sources, weights };
        (!self.products.is_empty()).then(|| LaterSelection { tensors: self.factors.clone(), weighted })
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
