//! Averages of the products of low-rank adapters.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;

use super::plan::MergeRow;
use crate::checkpoint::{Adapters, FactorPair};
use crate::error::{Error, Result};
use crate::math::{CutProduct, FactorProduct, ProductShape, average_products};
use crate::synthesis::{Elements, TensorSource};
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

/// Adapters, and the averages of their products that were computed.
#[derive(Debug)]
pub(super) struct Products {
    pub adapters: Adapters,
    computed: Mutex<Vec<(RowKey, Arc<AveragedProducts>)>>,
}

/// Bits of the weights of a target, and the index of its newest checkpoint.
type RowKey = (Vec<u64>, usize);

/// Factors of averaged products, in f64.
#[derive(Debug)]
pub(super) struct AveragedProducts {
    factors: BTreeMap<String, Vec<u8>>,
    pub errors: ProductErrors,
}

impl TensorSource for AveragedProducts {
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        self.factors.get(name).map(|factor| (Dtype::F64, Elements::Host(factor)))
    }
}

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

    /// Averages the products for a target, or returns those that were computed for the same weights. `sources` are the
    /// checkpoints with their indices. `progress` is called with the bytes read since the last call.
    ///
    /// # Errors
    /// [`Error::Tensor`] for factors that are not finite.
    pub(super) fn average(
        &self,
        row: &MergeRow,
        sources: &BTreeMap<usize, &dyn TensorSource>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Arc<AveragedProducts>> {
        let key: RowKey = (row.weights.iter().map(|weight| weight.to_bits()).collect(), row.newest);
        let computed = || self.computed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = computed().iter().find(|(other, _)| *other == key) {
            return Ok(found.clone());
        }
        let average = |i: usize| self.average_pair(i, row, sources, progress);
        // Collected before errors are looked for, so that the first one does not depend on the threads.
        let cut: Vec<Result<CutProduct>> = (0..self.adapters.pairs.len()).into_par_iter().map(average).collect();
        let mut factors = BTreeMap::new();
        let [mut norm, mut truncated, mut of_factors] = [0.0; 3];
        for (pair, cut) in self.adapters.pairs.iter().zip(cut) {
            let cut = cut?;
            norm += cut.norm;
            truncated += cut.cut;
            of_factors += cut.of_factors;
            factors.insert(pair.up.clone(), bytemuck::cast_slice(&cut.up).to_vec());
            factors.insert(pair.down.clone(), bytemuck::cast_slice(&cut.down).to_vec());
        }
        let relative = |square: f64| if norm > 0.0 { (square / norm).sqrt() } else { 0.0 };
        let errors = ProductErrors {
            pairs: self.adapters.pairs.len(),
            truncation_error: relative(truncated),
            factors_error: relative(of_factors),
        };
        let averaged = Arc::new(AveragedProducts { factors, errors });
        computed().push((key, averaged.clone()));
        Ok(averaged)
    }

    /// Averages the products of one pair of factors. Scales are those relative to the newest checkpoint, whose own
    /// scale is kept.
    fn average_pair(
        &self,
        i: usize,
        row: &MergeRow,
        sources: &BTreeMap<usize, &dyn TensorSource>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<CutProduct> {
        let FactorPair { up, down, rows, columns, rank, .. } = &self.adapters.pairs[i];
        let scale_of = |model: usize| self.adapters.scales[model][i];
        let mut products = Vec::new();
        for (model, &weight) in row.weights.iter().enumerate().filter(|(_, weight)| **weight != 0.0) {
            let source = sources.get(&model).copied();
            let scale = scale_of(model) / scale_of(row.newest);
            let mut scaled = read(source, up, progress)?;
            scaled.iter_mut().for_each(|element| *element *= scale);
            products.push(FactorProduct { weight, up: scaled, down: read(source, down, progress)? });
        }
        let shape = ProductShape { rows: *rows, columns: *columns, rank: *rank };
        let cut = average_products(&products, shape);
        cut.ok_or_else(|| Error::tensor(down, "the singular values of its products do not converge"))
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
