//! Search for values that are not finite.

use half::{bf16, f16};
use rayon::prelude::*;

use super::Dtype;

/// Returns the index and the value of the first element that is NaN or infinite; its exponent is all ones.
///
/// Dtypes that are not averaged have none.
pub(crate) fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f64)> {
    match dtype {
        Dtype::F16 => {
            let found = find(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00);
            found.map(|(i, b)| (i, f16::from_le_bytes(b).to_f64()))
        }
        Dtype::BF16 => {
            let found = find(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80);
            found.map(|(i, b)| (i, bf16::from_le_bytes(b).to_f64()))
        }
        Dtype::F32 => {
            let found = find(bytes, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000);
            found.map(|(i, b)| (i, f32::from_le_bytes(b).into()))
        }
        Dtype::F64 => {
            let found = find(bytes, |b| u64::from_le_bytes(b) & 0x7ff0 << 48 == 0x7ff0 << 48);
            found.map(|(i, b)| (i, f64::from_le_bytes(b)))
        }
        _ => None,
    }
}

/// Returns the first element of `N` bytes for which `matches` is true, with its index.
fn find<const N: usize>(bytes: &[u8], matches: impl Fn([u8; N]) -> bool + Sync) -> Option<(usize, [u8; N])> {
    const BLOCK: usize = 1 << 16;
    let (elements, _) = bytes.as_chunks::<N>();
    // Without an early exit within a block, so that the compiler can vectorise the loop.
    let any = |block: &[[u8; N]]| block.iter().fold(false, |found, &element| found | matches(element));
    let start = elements.par_chunks(BLOCK).position_first(any)? * BLOCK;
    let offset = elements[start..].iter().position(|&element| matches(element))?;
    Some((start + offset, elements[start + offset]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_non_finite_element_is_found_in_each_dtype() {
        let check = |dtype: Dtype, one: &[u8], nan: &[u8], inf: &[u8]| {
            for (len, at) in [(1, 0), (100, 99), (200_000, 70_000)] {
                let mut bytes = one.repeat(len);
                assert_eq!(first_non_finite(dtype, &bytes), None);
                bytes[(len - 1) * one.len()..].copy_from_slice(inf);
                assert_eq!(first_non_finite(dtype, &bytes), Some((len - 1, f64::NEG_INFINITY)));
                bytes[at * one.len()..(at + 1) * one.len()].copy_from_slice(nan);
                assert!(first_non_finite(dtype, &bytes).is_some_and(|(i, value)| i == at && value.is_nan()));
            }
        };
        check(Dtype::F16, &f16::ONE.to_le_bytes(), &f16::NAN.to_le_bytes(), &f16::NEG_INFINITY.to_le_bytes());
        check(Dtype::BF16, &bf16::ONE.to_le_bytes(), &bf16::NAN.to_le_bytes(), &bf16::NEG_INFINITY.to_le_bytes());
        check(Dtype::F32, &1f32.to_le_bytes(), &f32::NAN.to_le_bytes(), &f32::NEG_INFINITY.to_le_bytes());
        check(Dtype::F64, &1f64.to_le_bytes(), &f64::NAN.to_le_bytes(), &f64::NEG_INFINITY.to_le_bytes());
        assert_eq!(first_non_finite(Dtype::I32, &[0xff; 8]), None);
    }
}
