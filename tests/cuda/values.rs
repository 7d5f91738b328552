//! Random values: ordinary numbers and arbitrary bit patterns.

use std::ops::Range;

use half::{bf16, f16};
use posthoc_ema::Dtype;
use posthoc_ema::compute::cpu::Averages;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const AVERAGED: [Dtype; 4] = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64];

pub fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

pub fn size(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// Returns random elements, of which a quarter have arbitrary bits: subnormals, infinities, NaN.
pub fn wild(random: &mut ChaCha8Rng, dtype: Dtype, elements: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(elements * size(dtype));
    for _ in 0..elements {
        if random.random::<u8>() < 64 {
            bytes.extend(&random.random::<u64>().to_le_bytes()[..size(dtype)]);
        } else {
            bytes.extend(encode(random.random::<f64>() * 4.0 - 2.0, dtype));
        }
    }
    bytes
}

/// Returns random elements between -2 and 2.
pub fn tame(random: &mut ChaCha8Rng, dtype: Dtype, elements: usize) -> Vec<u8> {
    (0..elements).flat_map(|_| encode(random.random::<f64>() * 4.0 - 2.0, dtype)).collect()
}

pub fn encode(value: f64, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => (value as f32).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

/// Returns the bits of f32 values. Every NaN has the same bits, because its payload differs between devices.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { 0x7fff_ffff } else { v.to_bits() }).collect()
}

/// Returns the low-order terms of averages, if they have any. Those of numbers that are not finite have no meaning.
pub fn terms(averages: &Averages, place: Range<usize>) -> Option<Vec<i16>> {
    let low = averages.low.as_ref()?;
    Some(place.map(|i| if averages.high[i].is_finite() { low[i] } else { 0 }).collect())
}
