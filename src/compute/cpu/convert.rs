//! Conversions between element types, rounded to nearest even. Subnormals are kept, and every NaN becomes the quiet NaN
//! that CUDA writes.
//!
//! The conversions use integer operations without branches. They vectorise, and a flush-to-zero mode that another
//! library has set does not change their results.

use safetensors::Dtype;

use super::SimdLevel;
use super::low_order;
use super::x86;

/// NaN that CUDA's conversions write, the same bits for f16 and bf16.
const NAN_16: u16 = 0x7fff;

/// Converts f16 bits to f32, exactly.
#[inline(always)]
pub fn f16_to_f32(half: u16) -> f32 {
    const EXPONENT: u32 = 0x7c00 << 13;
    let bits = u32::from(half & 0x7fff) << 13;
    let exponent = bits & EXPONENT;
    let normal = bits + ((127 - 15) << 23);
    // Infinity and NaN get the f32 exponent 255. A subnormal is the difference to the smallest normal.
    let special = normal + ((128 - 16) << 23);
    let subnormal = (f32::from_bits(normal + (1 << 23)) - f32::from_bits(113 << 23)).to_bits();
    let magnitude = if exponent == EXPONENT { special } else { normal };
    let magnitude = if exponent == 0 { subnormal } else { magnitude };
    f32::from_bits(magnitude | u32::from(half & 0x8000) << 16)
}

/// Rounds to the nearest f16. Magnitudes from 65,520 on become infinite.
#[inline(always)]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let sign = ((bits >> 16) & 0x8000) as u16;
    let even = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_add(0xc800_0fff + even) >> 13;
    // Adding 0.5 aligns the last bit of a subnormal f16 with the last bit of the sum, which rounds to nearest even.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let clamped = if magnitude >= 143 << 23 { 0x7c00 } else { finite as u16 };
    if magnitude > 0x7f80_0000 { NAN_16 } else { clamped | sign }
}

/// Converts bf16 bits to f32, exactly.
#[inline(always)]
pub fn bf16_to_f32(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// Rounds to the nearest bf16.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { NAN_16 } else { rounded as u16 }
}

/// Returns the largest magnitude that rounds to a finite value of `dtype`, or none if `dtype` is not averaged.
pub fn max_finite(dtype: Dtype) -> Option<f64> {
    match dtype {
        // Values from halfway to the next power of two on round to infinity. The limit is the f32 just below.
        Dtype::F16 => Some(f64::from(65520f32.next_down())),
        Dtype::BF16 => Some(f64::from(f32::from_bits(0x7f7f_7fff))),
        Dtype::F32 => Some(f64::from(f32::MAX)),
        Dtype::F64 => Some(f64::MAX),
        _ => None,
    }
}

#[inline(always)]
fn values<const N: usize, T>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> impl Iterator<Item = T> {
    bytes.as_chunks::<N>().0.iter().map(move |element| from(*element))
}

#[inline(always)]
fn fill<T>(dst: &mut [T], values: impl Iterator<Item = T>) {
    dst.iter_mut().zip(values).for_each(|(dst, value)| *dst = value);
}

/// Converts elements of an averaged dtype to f32. `src` holds `dst.len()` elements at any alignment.
#[inline(always)]
pub fn to_f32(dst: &mut [f32], src: &[u8], dtype: Dtype) {
    to_f32_with(SimdLevel::best(), dst, src, dtype);
}

/// As [`to_f32`], with the instructions of `level`.
#[inline(always)]
pub(super) fn to_f32_with(level: SimdLevel, dst: &mut [f32], src: &[u8], dtype: Dtype) {
    match dtype {
        Dtype::F32 => fill(dst, values(src, f32::from_le_bytes)),
        Dtype::F16 => {
            let done = x86::f16_to_f32(level, dst, src);
            fill(&mut dst[done..], values(&src[2 * done..], |b| f16_to_f32(u16::from_le_bytes(b))));
        }
        Dtype::BF16 => fill(dst, values(src, |b| bf16_to_f32(u16::from_le_bytes(b)))),
        Dtype::F64 => fill(dst, values(src, |b| f64::from_le_bytes(b) as f32)),
        _ => unreachable!("{dtype} is not averaged"),
    }
}

/// Converts elements of an averaged dtype to f64, exactly.
#[inline(always)]
pub(super) fn to_f64(level: SimdLevel, dst: &mut [f64], src: &[u8], dtype: Dtype) {
    let done = x86::to_f64(level, dtype, dst, src);
    if done == dst.len() {
        return;
    }
    let dst = &mut dst[done..];
    let src = &src[done * dtype.bitsize() / 8..];
    match dtype {
        Dtype::F32 => fill(dst, values(src, |b| f64::from(f32::from_le_bytes(b)))),
        Dtype::F16 => fill(dst, values(src, |b| f64::from(f16_to_f32(u16::from_le_bytes(b))))),
        Dtype::BF16 => fill(dst, values(src, |b| f64::from(bf16_to_f32(u16::from_le_bytes(b))))),
        Dtype::F64 => fill(dst, values(src, f64::from_le_bytes)),
        _ => unreachable!("{dtype} is not averaged"),
    }
}

#[inline(always)]
fn store<const N: usize>(dst: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
    dst.as_chunks_mut::<N>().0.iter_mut().zip(values).for_each(|(dst, value)| *dst = value);
}

/// Converts f64 values to an averaged dtype. Returns true if all of them fit: finite, and at most [`max_finite`].
///
/// 16-bit types are rounded by way of f32, to within 1 ulp.
#[inline(always)]
pub(super) fn from_f64(level: SimdLevel, dst: &mut [u8], src: &[f64], dtype: Dtype) -> bool {
    let limit = max_finite(dtype).unwrap_or(f64::MAX);
    match dtype {
        Dtype::F32 => store_fitting(dst, src, limit, |x| (x as f32).to_le_bytes()),
        Dtype::F16 => {
            let (done, fits) = x86::f16_from_f64(level, dst, src, limit);
            let rest = |x| f32_to_f16(x as f32).to_le_bytes();
            store_fitting(&mut dst[2 * done..], &src[done..], limit, rest) & fits
        }
        Dtype::BF16 => store_fitting(dst, src, limit, |x| f32_to_bf16(x as f32).to_le_bytes()),
        Dtype::F64 => store_fitting(dst, src, limit, f64::to_le_bytes),
        _ => unreachable!("{dtype} is not averaged"),
    }
}

/// Stores all values and returns true if all are within `limit`. A loop that stops early would not vectorise.
#[inline(always)]
fn store_fitting<const N: usize>(dst: &mut [u8], src: &[f64], limit: f64, to: impl Fn(f64) -> [u8; N]) -> bool {
    let mut fits = true;
    for (dst, &x) in dst.as_chunks_mut::<N>().0.iter_mut().zip(src) {
        fits &= x.abs() <= limit;
        *dst = to(x);
    }
    fits
}

/// Converts elements of an average to an averaged dtype. Only f64 includes the low-order term.
#[inline(always)]
pub(super) fn from_average(dst: &mut [u8], average: &[f32], low: Option<&[i16]>, dtype: Dtype) {
    match (dtype, low) {
        (Dtype::F32, _) => store(dst, average.iter().map(|x| x.to_le_bytes())),
        (Dtype::F16, _) => store(dst, average.iter().map(|&x| f32_to_f16(x).to_le_bytes())),
        (Dtype::BF16, _) => store(dst, average.iter().map(|&x| f32_to_bf16(x).to_le_bytes())),
        (Dtype::F64, None) => store(dst, average.iter().map(|&x| f64::from(x).to_le_bytes())),
        (Dtype::F64, Some(low)) => {
            let sum = |(&x, &low): (&f32, &i16)| (f64::from(x) + f64::from(low_order::decode(x, low))).to_le_bytes();
            store(dst, average.iter().zip(low).map(sum));
        }
        _ => unreachable!("{dtype} is not averaged"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn every_f16_and_bf16_converts_as_in_half_crate() {
        for bits in 0..=u16::MAX {
            let (got, expected) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()), "{bits:#x}");
            let (got, expected) = (bf16_to_f32(bits), bf16::from_bits(bits).to_f32());
            assert!(got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()), "{bits:#x}");
        }
    }

    #[test]
    fn f16_slices_convert_as_single_elements() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        for shift in [0, 1, 5, 8] {
            let bytes: &[u8] = bytemuck::cast_slice(&bits[shift..]);
            let (mut singles, mut doubles) = (vec![0f32; bits.len() - shift], vec![0f64; bits.len() - shift]);
            to_f32(&mut singles, bytes, Dtype::F16);
            to_f64(SimdLevel::best(), &mut doubles, bytes, Dtype::F16);
            for (i, &half) in bits[shift..].iter().enumerate() {
                let expected = f16_to_f32(half);
                let same = singles[i].to_bits() == expected.to_bits() && doubles[i] == f64::from(expected);
                assert!(same || (expected.is_nan() && singles[i].is_nan() && doubles[i].is_nan()), "{half:#x}");
            }
        }
    }

    /// Returns every 251st f32, and those near each boundary between f16 values.
    fn samples() -> impl Iterator<Item = f32> {
        let edges = (0..=u16::MAX).flat_map(|bits| {
            let at = f16::from_bits(bits).to_f32().to_bits();
            [0u32, 0xfff, 0x1000, 0x1001, 0x1fff, 0x7fff, 0x8000, 0x8001].map(|d| f32::from_bits(at.wrapping_add(d)))
        });
        (0..=u32::MAX).step_by(251).map(f32::from_bits).chain(edges)
    }

    #[test]
    fn f32_rounds_as_in_half_crate() {
        for value in samples() {
            let (h, b) = (f32_to_f16(value), f32_to_bf16(value));
            if value.is_nan() {
                assert_eq!((h, b), (NAN_16, NAN_16));
            } else {
                assert_eq!(h, f16::from_f32(value).to_bits(), "{value:e}");
                assert_eq!(b, bf16::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }

    #[test]
    fn max_finite_is_last_value_that_rounds_to_finite() {
        for (dtype, infinite) in [(Dtype::F16, 65520f32), (Dtype::BF16, f32::from_bits(0x7f7f_8000))] {
            let largest = max_finite(dtype).unwrap();
            assert_eq!(largest, f64::from(infinite.next_down()));
            let round =
                |x: f32| if dtype == Dtype::F16 { f16_to_f32(f32_to_f16(x)) } else { bf16_to_f32(f32_to_bf16(x)) };
            assert!(round(largest as f32).is_finite());
            assert!(round(infinite).is_infinite());
        }
    }

    #[test]
    fn every_alignment_and_length_round_trips() {
        let numbers: Vec<f32> = (0..70).map(|i| i as f32 * 0.37 - 9.0).collect();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64] {
            let size = dtype.bitsize() / 8;
            for length in 0..numbers.len() {
                for shift in 0..8 {
                    let mut bytes = vec![0xa5u8; shift + length * size + 3];
                    from_average(&mut bytes[shift..shift + length * size], &numbers[..length], None, dtype);
                    let mut back = vec![f32::NAN; length];
                    to_f32(&mut back, &bytes[shift..shift + length * size], dtype);
                    for (got, &number) in back.iter().zip(&numbers) {
                        let expected = match dtype {
                            Dtype::F16 => f16::from_f32(number).to_f32(),
                            Dtype::BF16 => bf16::from_f32(number).to_f32(),
                            _ => number,
                        };
                        assert_eq!(*got, expected);
                    }
                    assert!(bytes[..shift].iter().chain(&bytes[shift + length * size..]).all(|&b| b == 0xa5));
                }
            }
        }
    }
}
