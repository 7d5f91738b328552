//! Infinities that are the same in all sources, as those of a mask: they stay. Their sum is NaN for weights of both
//! signs.

use std::collections::BTreeMap;

use half::{bf16, f16};
use safetensors::Dtype;

use crate::compute::cpu::{self, Blend, Overflow};
use crate::tensor::to_f64;

/// Blends elements again that gave `overflow`: with zero for each infinity that all sources share, which then becomes
/// the result of its element.
///
/// # Errors
/// A sum that is not finite for another reason; `overflow` if no infinity is shared.
pub(super) fn blend_again(
    dst: &mut [&mut [u8]],
    sources: &[&[u8]],
    blend: &Blend<'_>,
    overflow: Overflow,
) -> Result<(), Overflow> {
    let shared = shared_infinities(sources, blend.dtypes);
    if overflow.value.is_finite() || shared.is_empty() {
        return Err(overflow);
    }
    let mut zeroed = Vec::with_capacity(sources.len());
    for (source, dtype) in sources.iter().zip(blend.dtypes) {
        let mut copy = source.to_vec();
        shared.keys().for_each(|&element| copy[bytes_of(element, *dtype)].fill(0));
        zeroed.push(copy);
    }
    let zeroed: Vec<&[u8]> = zeroed.iter().map(Vec::as_slice).collect();
    cpu::blend(dst, &zeroed, blend)?;
    for (&element, &value) in &shared {
        for dst in dst.iter_mut() {
            write(&mut dst[bytes_of(element, blend.output)], value, blend.output);
        }
    }
    Ok(())
}

/// Returns the infinities that all sources share, by their elements.
fn shared_infinities(sources: &[&[u8]], dtypes: &[Dtype]) -> BTreeMap<usize, f64> {
    let mut shared: Option<BTreeMap<usize, f64>> = None;
    for (source, dtype) in sources.iter().zip(dtypes) {
        let values = to_f64(*dtype, source).unwrap_or_default();
        match &mut shared {
            None => shared = Some(values.into_iter().enumerate().filter(|(_, value)| value.is_infinite()).collect()),
            Some(shared) => shared.retain(|&element, value| values.get(element) == Some(value)),
        }
    }
    shared.unwrap_or_default()
}

/// Range of bytes of an element.
fn bytes_of(element: usize, dtype: Dtype) -> std::ops::Range<usize> {
    let size = dtype.bitsize() / 8;
    element * size..(element + 1) * size
}

/// Writes a value of a dtype that is averaged.
fn write(dst: &mut [u8], value: f64, dtype: Dtype) {
    match dtype {
        Dtype::F64 => dst.copy_from_slice(&value.to_le_bytes()),
        Dtype::F16 => dst.copy_from_slice(&f16::from_f64(value).to_le_bytes()),
        Dtype::BF16 => dst.copy_from_slice(&bf16::from_f64(value).to_le_bytes()),
        _ => dst.copy_from_slice(&(value as f32).to_le_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAST: f32 = f32::INFINITY;

    /// Blends two sources with weights of both signs, and returns the results.
    fn blend(sources: [&[f32]; 2], output: Dtype) -> Result<Vec<f64>, Overflow> {
        let sources = sources.map(bytemuck::cast_slice::<f32, u8>);
        let blend = Blend { dtypes: &[Dtype::F32; 2], weights: &[1.5, -0.5], output };
        let mut bytes = vec![7; sources[0].len() / 4 * output.bitsize() / 8];
        let mut dst = [bytes.as_mut_slice()];
        cpu::blend(&mut dst, &sources, &blend).or_else(|over| blend_again(&mut dst, &sources, &blend, over))?;
        Ok(to_f64(output, &bytes).unwrap())
    }

    #[test]
    fn shared_infinities_stay_and_all_else_is_blended() {
        let [first, second] = [[1.0, -LAST, 3.0, LAST], [2.0, -LAST, 1.0, LAST]];
        for output in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
            let expected = vec![0.5, f64::NEG_INFINITY, 4.0, f64::INFINITY];
            assert_eq!(blend([&first, &second], output), Ok(expected), "{output}");
        }
    }

    #[test]
    fn other_values_that_are_not_finite_are_refused() {
        let other = [[LAST, -LAST], [f32::NAN, LAST], [LAST, 1.0]];
        for wrong in other {
            for sources in [[[LAST, wrong[0]], [LAST, wrong[1]]], [[LAST, wrong[1]], [LAST, wrong[0]]]] {
                let found = blend([&sources[0], &sources[1]], Dtype::F32).unwrap_err();
                assert_eq!((found.element, found.value.is_finite()), (1, false), "{wrong:?}");
            }
        }
        let found = blend([&[LAST, 1e5], &[LAST, -1e5]], Dtype::F16).unwrap_err();
        assert_eq!((found.element, found.value), (1, 2e5));
    }
}
