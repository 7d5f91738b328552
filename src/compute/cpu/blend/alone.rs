//! One target: each source's values go from memory into registers and nowhere else.
//!
//! A tile of the target is summed up over all sources before the next one is begun. With forty sources that is more
//! streams than the hardware foresees, and fewer bytes of each than it needs to find out: what follows in every stream is
//! asked for ahead, which brings the loop from two thirds of the memory's speed to all of it.

use std::ops::Range;

use safetensors::Dtype;

use super::super::convert::{bf16_to_f32, f16_to_f32};
use super::super::x86::{self, TILE};
use super::super::{Level, prefetch};
use super::{Blend, Unfit};

/// Sources added at a time where sums are not held in registers.
const GROUP: usize = 4;

/// Blends a stretch of a single target.
pub(super) fn blend(level: Level, dst: &mut [u8], sources: &[&[u8]], blend: &Blend<'_>) -> Result<(), Unfit> {
    let groups = groups(blend.dtypes);
    let size = blend.output.bitsize() / 8;
    level.run(
        #[inline(always)]
        || {
            for (i, dst) in dst.chunks_mut(TILE * size).enumerate() {
                let mut sums = [0.0; TILE];
                let sums = &mut sums[..dst.len() / size];
                for (dtype, group) in &groups {
                    let weights = &blend.weights[group.clone()];
                    Group { level, start: i * TILE, sources: &sources[group.clone()], weights }.add(sums, *dtype);
                }
                blend.store(level, dst, sums, 0, i * TILE)?;
            }
            Ok(())
        },
    )
}

/// Neighbouring sources of one dtype.
fn groups(dtypes: &[Dtype]) -> Vec<(Dtype, Range<usize>)> {
    let mut groups = Vec::new();
    let mut start = 0;
    for group in dtypes.chunk_by(|a, b| a == b) {
        groups.push((group[0], start..start + group.len()));
        start += group.len();
    }
    groups
}

/// Sources of one dtype, and where their tile begins.
struct Group<'a> {
    level: Level,
    start: usize,
    sources: &'a [&'a [u8]],
    weights: &'a [f64],
}

impl Group<'_> {
    /// Adds the sources to the sums of a tile, in their order.
    #[inline(always)]
    fn add(&self, sums: &mut [f64], dtype: Dtype) {
        if x86::add(self.level, dtype, sums, self.sources, self.weights, self.start) {
            return;
        }
        match dtype {
            Dtype::F32 => self.add_values(sums, |x| f64::from(f32::from_le_bytes(x))),
            Dtype::F64 => self.add_values(sums, f64::from_le_bytes),
            Dtype::BF16 => self.add_values(sums, |x| f64::from(bf16_to_f32(u16::from_le_bytes(x)))),
            Dtype::F16 => self.add_values(sums, |x| f64::from(f16_to_f32(u16::from_le_bytes(x)))),
            other => unreachable!("{other} is not averaged"),
        }
    }

    #[inline(always)]
    fn add_values<const N: usize>(&self, sums: &mut [f64], value: impl Fn([u8; N]) -> f64 + Copy) {
        let (sources, rest) = self.sources.as_chunks::<GROUP>();
        let (weights, rest_weights) = self.weights.as_chunks::<GROUP>();
        for (sources, weights) in sources.iter().zip(weights) {
            add_four(sums, sources.map(|source| self.tile(source, sums.len())), *weights, value);
        }
        for (source, weight) in rest.iter().zip(rest_weights) {
            let values = self.tile(source, sums.len());
            sums.iter_mut().zip(values).for_each(|(sum, x)| *sum = weight.mul_add(value(*x), *sum));
        }
    }

    /// The tile of a source; the hardware is told that the next ones will follow.
    #[inline(always)]
    fn tile<'s, const N: usize>(&self, source: &'s [u8], elements: usize) -> &'s [[u8; N]] {
        let tile = &source[self.start * N..(self.start + elements) * N];
        prefetch::reading(tile);
        tile.as_chunks().0
    }
}

/// Adds four sources to the sums, in their order.
#[inline(always)]
fn add_four<const N: usize>(
    sums: &mut [f64],
    [a, b, c, d]: [&[[u8; N]]; GROUP],
    [wa, wb, wc, wd]: [f64; GROUP],
    value: impl Fn([u8; N]) -> f64,
) {
    for (sum, ((a, b), (c, d))) in sums.iter_mut().zip(a.iter().zip(b).zip(c.iter().zip(d))) {
        let first = wb.mul_add(value(*b), wa.mul_add(value(*a), *sum));
        *sum = wd.mul_add(value(*d), wc.mul_add(value(*c), first));
    }
}
