//! Values that no average can hold: NaN, and infinities that not all checkpoints share.

use std::ops::Range;

use super::model::CheckpointModel;
use crate::synthesis::TensorSource;
use crate::tensor::{first_non_finite, to_f64};

/// Elements that are looked through at a time.
const PIECE_ELEMENTS: usize = 1 << 16;

/// Returns the first element of a checkpoint's tensor that is NaN, or an infinity that another does not hold.
pub(crate) fn first_odd<'a>(
    model: &CheckpointModel,
    tensor: &str,
    others: impl Iterator<Item = &'a CheckpointModel> + Clone,
) -> Option<(usize, f64)> {
    let (dtype, elements) = model.stored(tensor)?;
    let count = elements.len() / (dtype.bitsize() / 8);
    let mut copy = Vec::new();
    for start in (0..count).step_by(PIECE_ELEMENTS) {
        let range = start..count.min(start + PIECE_ELEMENTS);
        let size = dtype.bitsize() / 8;
        let bytes = elements.read(range.start * size..range.end * size, &mut copy)?;
        if first_non_finite(dtype, bytes).is_none() {
            continue;
        }
        let own = to_f64(dtype, bytes)?;
        let mut odd: Vec<bool> = own.iter().map(|value| value.is_nan()).collect();
        for other in others.clone() {
            let values = numbers(other, tensor, range.clone()).unwrap_or_default();
            let is_odd = |i: usize| !own[i].is_finite() && values.get(i) != Some(&own[i]);
            (0..own.len()).for_each(|i| odd[i] |= is_odd(i));
        }
        if let Some(i) = odd.iter().position(|odd| *odd) {
            return Some((start + i, own[i]));
        }
    }
    None
}

/// Returns some elements of a tensor.
fn numbers(model: &CheckpointModel, tensor: &str, range: Range<usize>) -> Option<Vec<f64>> {
    let (dtype, elements) = model.stored(tensor)?;
    let size = dtype.bitsize() / 8;
    let mut copy = Vec::new();
    to_f64(dtype, elements.read(range.start * size..range.end * size, &mut copy)?)
}
