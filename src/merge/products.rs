//! Averages of the products of low-rank adapters.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;

use super::plan::MergeRow;
use crate::checkpoint::{Adapters, FactorPair};
use crate::error::{Error, Result};
use crate::math::{CutProduct, ProductShape, ProductStack};
use crate::synthesis::{ComputedSources, Elements, LaterSelection, TensorSource, WeightedSources};
use crate::tensor::{first_non_finite, to_f64};

/// Errors of an average of low-rank adapters, in the Frobenius norm of all their products together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ProductErrors {
    /// Number of adapters: pairs of factors.
    pub pairs: usize,
    /// Distance of the products in the average from the averages of the products, relative to these. It comes from
    /// cutting them back to the rank of the factors. Rounding to the dtype of the factors is not in it.
    pub truncation_error: f64,
    /// The same distance for averages of the factors.
    pub factors_error: f64,
}

/// Bytes that the averages of a group of pairs may take, unless a single pair takes more.
const GROUP_BYTES: usize = 32 << 20;

/// Adapters, and the errors of the averages of their products that were computed.
#[derive(Debug)]
pub(super) struct Products {
    pub adapters: Adapters,
    computed: Mutex<Vec<(RowKey, ProductErrors)>>,
}

/// Bits of the weights of a target, and the index of its newest checkpoint.
type RowKey = (Vec<u64>, usize);

impl Products {
    pub(super) fn new(adapters: Adapters) -> Products {
        Products { adapters, computed: Mutex::default() }
    }

    /// Iterates over the names of all factors.
    pub(super) fn factors(&self) -> impl Iterator<Item = &str> {
        self.adapters.pairs.iter().flat_map(|pair| [pair.up.as_str(), pair.down.as_str()])
    }

    /// Iterates over the numbers of elements of each pair.
    pub(super) fn elements(&self) -> impl Iterator<Item = usize> {
        self.adapters.pairs.iter().map(|pair| pair.rank * (pair.rows + pair.columns))
    }

    /// Returns the number of targets whose averages of any one pair take at most half the memory of a group.
    pub(super) fn targets_in_one_pass(&self) -> usize {
        let largest = self.elements().max().unwrap_or(0) * size_of::<f64>();
        (GROUP_BYTES / 2 / largest.max(1)).max(1)
    }

    /// Returns the errors of a target, if its averages were computed.
    pub(super) fn errors(&self, row: &MergeRow) -> Option<ProductErrors> {
        let key = key(row);
        self.computed().iter().find(|(other, _)| *other == key).map(|(_, errors)| *errors)
    }

    fn computed(&self) -> MutexGuard<'_, Vec<(RowKey, ProductErrors)>> {
        self.computed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(row: &MergeRow) -> RowKey {
    (row.weights.iter().map(|weight| weight.to_bits()).collect(), row.newest)
}

/// Averages of the products of adapters for some targets, which are computed for a group of pairs at a time.
pub(super) struct ProductAverages<'a> {
    pub products: &'a Products,
    pub rows: Vec<&'a MergeRow>,
    /// Checkpoints by their indices.
    pub sources: BTreeMap<usize, &'a dyn TensorSource>,
    /// Called with the bytes read since the last call.
    pub progress: &'a (dyn Fn(u64) + Sync),
    factors: BTreeSet<&'a str>,
}

/// Factors of the averaged products of some pairs for one target, by name.
#[derive(Default)]
struct AveragedFactors<'a>(BTreeMap<&'a str, Vec<f64>>);

impl TensorSource for AveragedFactors<'_> {
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        self.0.get(name).map(|factor| (Dtype::F64, Elements::Host(bytemuck::cast_slice(factor))))
    }
}

/// Squares of the norm of averaged products, and of the distances from them.
#[derive(Clone, Default)]
struct ErrorSums {
    norm: f64,
    cut: f64,
    of_factors: f64,
}

impl ErrorSums {
    fn add(&mut self, product: &CutProduct) {
        self.norm += product.norm;
        self.cut += product.cut;
        self.of_factors += product.of_factors;
    }

    fn errors(&self, pairs: usize) -> ProductErrors {
        let relative = |square: f64| if self.norm > 0.0 { (square / self.norm).sqrt() } else { 0.0 };
        ProductErrors { pairs, truncation_error: relative(self.cut), factors_error: relative(self.of_factors) }
    }
}

impl ComputedSources for ProductAverages<'_> {
    fn computes(&self, tensor: &str) -> bool {
        self.factors.contains(tensor)
    }

    fn for_each_group(&self, take: &mut dyn FnMut(&LaterSelection<'_>) -> Result<()>) -> Result<()> {
        let pairs = &self.products.adapters.pairs;
        let mut sums = vec![ErrorSums::default(); self.rows.len()];
        for group in self.groups() {
            let averaged = self.average(&pairs[group.clone()], group.start, &mut sums)?;
            let targets = 0..averaged.len();
            let weight = |target, source| if target == source { 1.0 } else { 0.0 };
            take(&LaterSelection {
                tensors: pairs[group].iter().flat_map(|pair| [pair.up.clone(), pair.down.clone()]).collect(),
                weighted: WeightedSources {
                    sources: averaged.iter().map(|factors| factors as &dyn TensorSource).collect(),
                    weights: targets.clone().flat_map(|i| targets.clone().map(move |j| weight(i, j))).collect(),
                },
            })?;
        }
        let errors = self.rows.iter().zip(&sums).map(|(row, sums)| (key(row), sums.errors(pairs.len())));
        self.products.computed().extend(errors);
        Ok(())
    }
}

impl<'a> ProductAverages<'a> {
    pub(super) fn new(
        products: &'a Products,
        rows: &[&'a MergeRow],
        sources: BTreeMap<usize, &'a dyn TensorSource>,
        progress: &'a (dyn Fn(u64) + Sync),
    ) -> ProductAverages<'a> {
        ProductAverages { products, rows: rows.to_vec(), sources, progress, factors: products.factors().collect() }
    }

    /// Cuts the pairs into groups that take [`GROUP_BYTES`] or have a single pair.
    fn groups(&self) -> Vec<Range<usize>> {
        let of_all = |row: &&MergeRow| row.weights.iter().filter(|weight| **weight != 0.0).count();
        let products = self.rows.iter().map(of_all).max().unwrap_or(0);
        let (mut groups, mut start, mut bytes) = (Vec::new(), 0, 0);
        for (i, (pair, elements)) in self.products.adapters.pairs.iter().zip(self.products.elements()).enumerate() {
            let results = self.rows.len() * elements * size_of::<f64>();
            let more = ProductStack::bytes(shape_of(pair), products) + results;
            if i > start && bytes + more > GROUP_BYTES {
                groups.push(start..i);
                (start, bytes) = (i, 0);
            }
            bytes += more;
        }
        groups.push(start..self.products.adapters.pairs.len());
        groups
    }

    /// Averages the products of some pairs for each target. `first` is the index of the first pair.
    ///
    /// # Errors
    /// [`Error::Tensor`] for factors that are not finite.
    fn average(
        &self,
        pairs: &'a [FactorPair],
        first: usize,
        sums: &mut [ErrorSums],
    ) -> Result<Vec<AveragedFactors<'a>>> {
        let of_pair = |i: usize| self.rows.iter().map(|row| self.average_pair(first + i, row)).collect();
        // Collected before errors are looked for, so that the first one does not depend on the threads.
        let cut: Vec<Vec<Result<CutProduct>>> = (0..pairs.len()).into_par_iter().map(of_pair).collect();
        let mut averaged: Vec<AveragedFactors<'_>> = self.rows.iter().map(|_| AveragedFactors::default()).collect();
        for (pair, cut) in pairs.iter().zip(cut) {
            for ((AveragedFactors(factors), sums), cut) in averaged.iter_mut().zip(&mut *sums).zip(cut) {
                let cut = cut?;
                sums.add(&cut);
                factors.insert(&pair.up, cut.up);
                factors.insert(&pair.down, cut.down);
            }
        }
        Ok(averaged)
    }

    /// Averages the products of one pair of factors. Scales are those relative to the newest checkpoint, whose own
    /// scale is kept.
    fn average_pair(&self, i: usize, row: &MergeRow) -> Result<CutProduct> {
        let Adapters { pairs, scales } = &self.products.adapters;
        let FactorPair { up, down, .. } = &pairs[i];
        let used = || row.weights.iter().enumerate().filter(|(_, weight)| **weight != 0.0);
        let mut stack = ProductStack::new(shape_of(&pairs[i]), used().count());
        for (model, &weight) in used() {
            let source = self.sources.get(&model).copied();
            let scale = scales[model][i] / scales[row.newest][i];
            let mut scaled = read(source, up, self.progress)?;
            scaled.iter_mut().for_each(|element| *element *= scale);
            stack.push(weight, &scaled, &read(source, down, self.progress)?);
        }
        stack.average().ok_or_else(|| Error::tensor(down, "the singular values of its products do not converge"))
    }
}

/// Reads a factor.
fn read(source: Option<&dyn TensorSource>, name: &str, progress: &(dyn Fn(u64) + Sync)) -> Result<Vec<f64>> {
    let stored = source.and_then(|source| source.stored(name));
    let (dtype, elements) = stored.ok_or_else(|| Error::tensor(name, "a checkpoint lacks it"))?;
    let bytes = elements.to_bytes();
    if let Some((element, value)) = first_non_finite(dtype, &bytes) {
        return Err(Error::tensor(name, format!("it holds {value} at element {element}")));
    }
    progress(bytes.len() as u64);
    to_f64(dtype, &bytes).ok_or_else(|| Error::tensor(name, format!("{dtype} is not averaged")))
}

/// Returns the shape of the product of two factors.
fn shape_of(pair: &FactorPair) -> ProductShape {
    ProductShape { rows: pair.rows, columns: pair.columns, rank: pair.rank }
}
