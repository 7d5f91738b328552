//! Blend of any number of sources into any number of targets in one pass: `out[m] = sum_k w[m][k] x[k]`.
//!
//! Sums are in f64, from the first source to the last, and are rounded once at the end. With noise gains of tens and
//! weights of both signs, sums in f32 would be off by many ulps. The error in f64 is below `K 2^-53 sum |w x|`, far
//! less than half an ulp of the output.

mod multi_target;
mod single_target;
#[cfg(test)]
mod tests;

use safetensors::Dtype;

use super::SimdLevel;
use super::convert::{from_f64, max_finite};

/// Weights and dtypes of a blend.
#[derive(Clone, Copy, Debug)]
pub struct Blend<'a> {
    /// Dtype of each source.
    pub dtypes: &'a [Dtype],
    /// Weights `w[m][k]`: those of target 0 for all sources, then those of target 1, and so on.
    pub weights: &'a [f64],
    /// Dtype of the results.
    pub output: Dtype,
}

/// Sum that the output dtype cannot hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overflow {
    /// Index of the target.
    pub target: usize,
    /// Index of the element.
    pub element: usize,
    /// Value of the sum: NaN, infinite, or beyond the output dtype.
    pub value: f64,
}

/// Blends elements. All of `sources` and `dst` hold the same number, at any alignment.
///
/// # Errors
/// Returns a sum that is not finite in the output dtype. The results are then incomplete.
pub fn blend(dst: &mut [&mut [u8]], sources: &[&[u8]], blend: &Blend<'_>) -> Result<(), Overflow> {
    blend_with(SimdLevel::best(), dst, sources, blend)
}

/// As [`blend`], with the instructions of `level`.
///
/// # Errors
/// As [`blend`].
pub fn blend_with(
    level: SimdLevel,
    dst: &mut [&mut [u8]],
    sources: &[&[u8]],
    blend: &Blend<'_>,
) -> Result<(), Overflow> {
    debug_assert_eq!(blend.weights.len(), dst.len() * sources.len());
    match dst {
        [] => Ok(()),
        [dst] => single_target::blend(level, dst, sources, blend),
        _ => multi_target::blend(level, dst, sources, blend),
    }
}

impl Blend<'_> {
    /// Stores and checks the sums of a tile of `target` that begins at element `start`.
    #[inline(always)]
    fn store(
        &self,
        level: SimdLevel,
        dst: &mut [u8],
        sums: &[f64],
        target: usize,
        start: usize,
    ) -> Result<(), Overflow> {
        if from_f64(level, dst, sums, self.output) {
            return Ok(());
        }
        let limit = max_finite(self.output).unwrap_or(f64::MAX);
        let element = sums.iter().position(|x| !(x.abs() <= limit)).unwrap_or(0);
        Err(Overflow { target, element: start + element, value: sums[element] })
    }
}
