//! Search for values that are not finite.

use half::{bf16, f16};
use rayon::prelude::*;

use super::Dtype;

/// Element that is NaN or infinite, among several tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NonFiniteElement {
    /// Index of the tensor.
    pub tensor: usize,
    /// Flat index in the tensor.
    pub element: usize,
    /// Value.
    pub value: f64,
}

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

/// Bytes of a block that a thread looks at, a multiple of every element's size.
const BLOCK_BYTES: usize = 1 << 18;

/// Total size in bytes up to which starting threads costs more than the look.
const FEW_BYTES: usize = 1 << 19;

/// Returns the first element of several tensors that is NaN or infinite.
///
/// Reads each tensor once. Tensors of dtypes that are not averaged have no such element.
pub(crate) fn first_non_finite_of(tensors: &[(Dtype, &[u8])]) -> Option<NonFiniteElement> {
    let blocks_of = |(i, (_, bytes)): (usize, &(Dtype, &[u8]))| {
        (0..bytes.len()).step_by(BLOCK_BYTES).map(move |start| (i, start)).collect::<Vec<_>>()
    };
    let blocks: Vec<(usize, usize)> = tensors.iter().enumerate().flat_map(blocks_of).collect();
    let is_bad = |&(i, start): &(usize, usize)| {
        let (dtype, bytes) = tensors[i];
        has_non_finite(dtype, &bytes[start..bytes.len().min(start + BLOCK_BYTES)])
    };
    let total: usize = tensors.iter().map(|(_, bytes)| bytes.len()).sum();
    let block =
        if total <= FEW_BYTES { blocks.iter().position(is_bad) } else { blocks.par_iter().position_first(is_bad) };
    let (tensor, start) = blocks[block?];
    let (dtype, bytes) = tensors[tensor];
    let (element, value) = first_non_finite(dtype, &bytes[start..])?;
    Some(NonFiniteElement { tensor, element: start / (dtype.bitsize() / 8) + element, value })
}

/// Returns true if an element is NaN or infinite, that is if one more in its exponent sets its sign bit.
///
/// Looks at eight bytes at a time and has no early exit, so that the compiler can vectorise the loop.
fn has_non_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    // All bits of the exponents in eight bytes, and the lowest bit of each.
    let (exponents, ones): (u64, u64) = match dtype {
        Dtype::F16 => (0x7c00_7c00_7c00_7c00, 0x0400_0400_0400_0400),
        Dtype::BF16 => (0x7f80_7f80_7f80_7f80, 0x0080_0080_0080_0080),
        Dtype::F32 => (0x7f80_0000_7f80_0000, 0x0080_0000_0080_0000),
        Dtype::F64 => (0x7ff0 << 48, 0x0010 << 48),
        _ => return false,
    };
    let add_one = |word: [u8; 8]| (u64::from_le_bytes(word) & exponents) + ones;
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let all = words.iter().fold(add_one(last), |all, &word| all | add_one(word));
    all & (exponents + ones) != 0
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
    fn first_non_finite_element_of_several_tensors_is_found() {
        let mut tensors = vec![vec![1f32; 3], vec![2.0; 100_001], vec![], vec![3.0; 5]];
        let find = |tensors: &[Vec<f32>]| {
            let views: Vec<(Dtype, &[u8])> = tensors.iter().map(|t| (Dtype::F32, bytemuck::cast_slice(t))).collect();
            first_non_finite_of(&views).map(|found| (found.tensor, found.element, found.value))
        };
        assert_eq!(find(&tensors), None);
        for (tensor, element) in [(3, 4), (1, 100_000), (1, 65_536), (1, 65_535), (0, 1)] {
            tensors[tensor][element] = f32::INFINITY;
            assert_eq!(find(&tensors), Some((tensor, element, f64::INFINITY)));
        }
        let ones = half::f16::ONE.to_le_bytes().repeat(400_000);
        let mut mixed = ones.clone();
        mixed[600_000..600_002].copy_from_slice(&f16::NAN.to_le_bytes());
        let views = [(Dtype::I32, &[0xff; 8][..]), (Dtype::F16, &ones), (Dtype::F16, &mixed)];
        let found = first_non_finite_of(&views).unwrap();
        assert!((found.tensor, found.element) == (2, 300_000) && found.value.is_nan());
        for (dtype, bytes) in [(Dtype::F64, &f64::NAN.to_le_bytes()[..]), (Dtype::BF16, &bf16::INFINITY.to_le_bytes())]
        {
            assert!(
                first_non_finite_of(&[(dtype, bytes)]).is_some_and(|found| (found.tensor, found.element) == (0, 0))
            );
        }
    }

    #[test]
    fn look_agrees_with_is_finite_for_every_exponent_and_lane() {
        let check = |dtype: Dtype, one: &[u8], bits: &[u8], is_finite: bool| {
            // Five elements fill no whole number of eight bytes.
            for lane in 0..5 {
                let mut bytes = one.repeat(5);
                bytes[lane * one.len()..(lane + 1) * one.len()].copy_from_slice(bits);
                assert_eq!(has_non_finite(dtype, &bytes), !is_finite, "{dtype} {bits:x?} {lane}");
            }
        };
        for bits in 0..=u16::MAX {
            let bytes = bits.to_le_bytes();
            check(Dtype::F16, &f16::ONE.to_le_bytes(), &bytes, f16::from_bits(bits).is_finite());
            check(Dtype::BF16, &bf16::NEG_ONE.to_le_bytes(), &bytes, bf16::from_bits(bits).is_finite());
            for low in [0, 1, 0xffff] {
                let bits = u32::from(bits) << 16 | low;
                check(Dtype::F32, &(-1f32).to_le_bytes(), &bits.to_le_bytes(), f32::from_bits(bits).is_finite());
                let bits = u64::from(bits) << 32 | u64::from(low);
                check(Dtype::F64, &1f64.to_le_bytes(), &bits.to_le_bytes(), f64::from_bits(bits).is_finite());
            }
        }
    }

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
