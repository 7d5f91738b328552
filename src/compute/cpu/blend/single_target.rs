//! Blend into one target. Sums stay in the L1 cache, and four sources at a time are added to them.
//!
//! A tile of the target is summed over all sources before the next tile begins. A tile of each source is long enough
//! for the hardware prefetcher, and so few streams are open that their pages stay in the TLB. The alternative, short
//! pieces of all sources with sums in registers, takes up to 50% longer from mapped files, whose pages are small. Every
//! stream is prefetched.

use std::ops::Range;

use safetensors::Dtype;

use super::super::convert::{bf16_to_f32, f16_to_f32};
use super::super::x86::{self, STEP};
use super::super::{SimdLevel, prefetch};
use super::{Blend, Overflow};

/// Number of elements per tile: 8 KiB of sums, and half a page of f16.
const TILE: usize = 1024;

/// Number of sources that are added together, so that the sums are read and written a quarter as often.
const GROUP: usize = 4;

/// Blends the elements of a single target.
pub(super) fn blend(level: SimdLevel, dst: &mut [u8], sources: &[&[u8]], blend: &Blend<'_>) -> Result<(), Overflow> {
    let groups = groups(blend.dtypes);
    let size = blend.output.bitsize() / 8;
    level.run(
        #[inline(always)]
        || {
            let mut sums = [0.0; TILE];
            for (i, dst) in dst.chunks_mut(TILE * size).enumerate() {
                let sums = &mut sums[..dst.len() / size];
                sums.fill(0.0);
                for (dtype, group) in &groups {
                    let sources = &sources[group.clone()];
                    let weights = &blend.weights[group.clone()];
                    SourceGroup { level, dtype: *dtype, start: i * TILE, sources, weights }.add(sums);
                }
                blend.store(level, dst, sums, 0, i * TILE)?;
            }
            Ok(())
        },
    )
}

/// Splits the sources into groups of neighbours of one dtype, at most [`GROUP`] each.
fn groups(dtypes: &[Dtype]) -> Vec<(Dtype, Range<usize>)> {
    let mut groups = Vec::new();
    let mut start = 0;
    for group in dtypes.chunk_by(|a, b| a == b).flat_map(|same| same.chunks(GROUP)) {
        groups.push((group[0], start..start + group.len()));
        start += group.len();
    }
    groups
}

/// Up to [`GROUP`] sources of one dtype, and the first element of the tile.
struct SourceGroup<'a> {
    level: SimdLevel,
    dtype: Dtype,
    start: usize,
    sources: &'a [&'a [u8]],
    weights: &'a [f64],
}

impl SourceGroup<'_> {
    /// Adds the sources to the sums of a tile, in their order.
    #[inline(always)]
    fn add(&self, sums: &mut [f64]) {
        match self.sources.len() {
            1 => self.add_of::<1>(sums),
            2 => self.add_of::<2>(sums),
            3 => self.add_of::<3>(sums),
            _ => self.add_of::<GROUP>(sums),
        }
    }

    #[inline(always)]
    fn add_of<const K: usize>(&self, sums: &mut [f64]) {
        let size = self.dtype.bitsize() / 8;
        let tile = |k: usize| &self.sources[k][self.start * size..][..sums.len() * size];
        let sources = std::array::from_fn(tile);
        let weights = std::array::from_fn(|k| self.weights[k]);
        let done = x86::add::<K>(self.level, self.dtype, sums, sources, weights);
        let sums = &mut sums[done..];
        let sources = sources.map(|source| &source[done * size..]);
        match self.dtype {
            Dtype::F32 => add_values(sums, sources, weights, |x| f64::from(f32::from_le_bytes(x))),
            Dtype::F64 => add_values(sums, sources, weights, f64::from_le_bytes),
            Dtype::BF16 => add_values(sums, sources, weights, |x| f64::from(bf16_to_f32(u16::from_le_bytes(x)))),
            Dtype::F16 => add_values(sums, sources, weights, |x| f64::from(f16_to_f32(u16::from_le_bytes(x)))),
            other => unreachable!("{other} is not averaged"),
        }
    }
}

/// Adds sources to sums, in their order.
#[inline(always)]
fn add_values<const K: usize, const N: usize>(
    sums: &mut [f64],
    sources: [&[u8]; K],
    weights: [f64; K],
    value: impl Fn([u8; N]) -> f64,
) {
    for (i, sums) in sums.chunks_mut(STEP).enumerate() {
        let sources = sources.map(|source| &source.as_chunks().0[i * STEP..][..sums.len()]);
        sources.iter().for_each(|source| prefetch::for_reading(source));
        for (j, sum) in sums.iter_mut().enumerate() {
            for k in 0..K {
                *sum = weights[k].mul_add(value(sources[k][j]), *sum);
            }
        }
    }
}
