//! The blend: `out[m] = sum_k w[m][k] x[k]`, any number of sources into any number of targets in one pass.
//!
//! Sums are taken in f64, from the first source to the last, and rounded once at the end. With noise gains of tens and
//! weights of both signs, sums in f32 would be off by many ulps; in f64 what is lost is below `K 2^-53 sum |w x|`, far
//! under half an ulp of the output.

mod alone;
mod several;
#[cfg(test)]
mod tests;

use safetensors::Dtype;

use super::SimdLevel;
use super::convert::{from_f64, max_finite};

/// Which sources are blended into which targets.
#[derive(Clone, Copy, Debug)]
pub struct Blend<'a> {
    /// The dtype of every source.
    pub dtypes: &'a [Dtype],
    /// The weights of target 0 for all sources, then those of target 1, and so on.
    pub weights: &'a [f64],
    /// The dtype of the results.
    pub output: Dtype,
}

/// A sum that the output dtype cannot hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overflow {
    /// The target.
    pub target: usize,
    /// The element within the stretch.
    pub element: usize,
    /// The value: NaN, infinite, or beyond the output dtype.
    pub value: f64,
}

/// Blends a stretch of elements: `sources[k]` and `dst[m]` hold the same number, of any alignment.
///
/// # Errors
/// The first sum that is not finite in the output dtype; the stretch's results are then incomplete.
pub fn blend(dst: &mut [&mut [u8]], sources: &[&[u8]], blend: &Blend<'_>) -> Result<(), Overflow> {
    blend_with(SimdLevel::best(), dst, sources, blend)
}

/// As [`blend`], with the instructions of a level.
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
        [dst] => alone::blend(level, dst, sources, blend),
        _ => several::blend(level, dst, sources, blend),
    }
}

impl Blend<'_> {
    /// Stores the sums of a tile of a target, which begins at element `start`, and checks them.
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
