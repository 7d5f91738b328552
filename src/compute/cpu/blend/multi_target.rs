//! Blend into several targets: a matrix product in tiles.
//!
//! A tile of several sources is converted to f64 in the L1 cache. Its values are then multiplied by the weights of
//! several targets with the sums in registers, as in a GEMM kernel. Arithmetic is the limit: two vector multiply-adds
//! per cycle.

use pulp::{Simd, WithSimd};

use super::super::convert::to_f64;
use super::super::fp_env::FpEnvGuard;
use super::super::{SimdLevel, prefetch};
use super::{Blend, Overflow};

/// Number of elements per tile: whole cache lines of every dtype, and whole stripes of every vector length.
const TILE: usize = 96;

/// Largest number of sources that are converted together. With [`TILE`], they fill 30 KiB, most of an L1 cache.
const DEPTH: usize = 40;

/// Number of vectors per stripe: those of each target that are summed in registers.
const VECTORS: usize = 3;

/// Blends the elements of several targets.
pub(super) fn blend(
    level: SimdLevel,
    dst: &mut [&mut [u8]],
    sources: &[&[u8]],
    blend: &Blend<'_>,
) -> Result<(), Overflow> {
    let _mode = FpEnvGuard::enter();
    level.arch().dispatch(TiledBlend { level, dst, sources, blend })
}

/// Arguments of a blend, for dispatch to an instruction set.
struct TiledBlend<'a, 'd> {
    level: SimdLevel,
    dst: &'a mut [&'d mut [u8]],
    sources: &'a [&'a [u8]],
    blend: &'a Blend<'a>,
}

impl WithSimd for TiledBlend<'_, '_> {
    type Output = Result<(), Overflow>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        // The largest number of targets that leaves registers for the values and a weight.
        if S::REGISTER_COUNT >= 32 { self.run::<S, 8>(simd) } else { self.run::<S, 4>(simd) }
    }
}

impl TiledBlend<'_, '_> {
    /// Blends into `N` targets at a time.
    #[inline(always)]
    fn run<S: Simd, const N: usize>(self, simd: S) -> Result<(), Overflow> {
        let targets = self.dst.len();
        let size = self.blend.output.bitsize() / 8;
        let elements = self.dst.first().map_or(0, |dst| dst.len() / size);
        let weights = Weights::<N>::new(self.blend.weights, self.sources.len());
        let mut sums = cache_lines(targets.next_multiple_of(N) * TILE);
        let sums = bytemuck::cast_slice_mut(&mut sums);
        let mut values = cache_lines(DEPTH.min(self.sources.len()) * TILE);
        let values = bytemuck::cast_slice_mut(&mut values);
        let depth = self.depth();
        for start in (0..elements).step_by(TILE) {
            let n = TILE.min(elements - start);
            for first in (0..self.sources.len()).step_by(depth) {
                let sources = first..self.sources.len().min(first + depth);
                let values = &mut values[..sources.len() * TILE];
                self.convert(values, sources.clone(), start, n);
                // A stripe's values stay in the L1 cache from one block of targets to the next.
                for at in (0..n).step_by(VECTORS * S::F64_LANES) {
                    for (block, sums) in sums.chunks_exact_mut(N * TILE).enumerate() {
                        let stripe =
                            Stripe { values, weights: weights.of(block, sources.clone()), at, begins: first == 0 };
                        stripe.add_to(simd, sums, N.min(targets - block * N));
                    }
                }
            }
            for (target, (dst, sums)) in self.dst.iter_mut().zip(sums.chunks_exact(TILE)).enumerate() {
                self.blend.store(self.level, &mut dst[start * size..][..n * size], &sums[..n], target, start)?;
            }
        }
        Ok(())
    }

    /// Returns the number of sources that are converted together: parts of even size, at most [`DEPTH`].
    fn depth(&self) -> usize {
        let sources = self.sources.len();
        sources.div_ceil(sources.div_ceil(DEPTH).max(1)).max(1)
    }

    /// Converts `n` elements of some sources, from element `start` on, to a row of `values` each.
    #[inline(always)]
    fn convert(&self, values: &mut [f64], sources: std::ops::Range<usize>, start: usize, n: usize) {
        for (k, values) in sources.zip(values.chunks_exact_mut(TILE)) {
            let dtype = self.blend.dtypes[k];
            let size = dtype.bitsize() / 8;
            let bytes = &self.sources[k][start * size..(start + n) * size];
            prefetch::for_reading(bytes);
            to_f64(self.level, &mut values[..n], bytes, dtype);
            // Elements after the last are added too, but their sums are never read.
            values[n..].fill(0.0);
        }
    }
}

/// Weights in the order of the loops: for `N` targets at a time, source by source.
struct Weights<const N: usize> {
    packed: Vec<[f64; N]>,
    sources: usize,
}

impl<const N: usize> Weights<N> {
    /// Reorders `weights`, which are those of target 0 for all sources, then those of target 1, and so on.
    fn new(weights: &[f64], sources: usize) -> Self {
        let mut packed = Vec::new();
        let rows: Vec<&[f64]> = weights.chunks_exact(sources.max(1)).collect();
        for rows in rows.chunks(N) {
            packed.extend((0..sources).map(|k| std::array::from_fn(|i| rows.get(i).map_or(0.0, |row| row[k]))));
        }
        Weights { packed, sources }
    }

    fn of(&self, block: usize, sources: std::ops::Range<usize>) -> &[[f64; N]] {
        &self.packed[block * self.sources..][sources]
    }
}

/// Stripe of all converted sources, and their weights for `N` targets.
struct Stripe<'a, const N: usize> {
    values: &'a [f64],
    weights: &'a [[f64; N]],
    /// First element within the tile.
    at: usize,
    /// True if these are the first sources, so that the sums begin with zero.
    begins: bool,
}

impl<const N: usize> Stripe<'_, N> {
    /// Adds the stripe to the sums of the first `targets` of the `N` targets. `sums` holds a tile for each.
    #[inline(always)]
    fn add_to<S: Simd>(&self, simd: S, sums: &mut [f64], targets: usize) {
        // Each number of targets has its own loop, so no unused target is computed.
        match targets {
            1 => self.add::<S, 1>(simd, sums),
            2 => self.add::<S, 2>(simd, sums),
            3 => self.add::<S, 3>(simd, sums),
            4 => self.add::<S, 4>(simd, sums),
            5 => self.add::<S, 5>(simd, sums),
            6 => self.add::<S, 6>(simd, sums),
            7 => self.add::<S, 7>(simd, sums),
            _ => self.add::<S, 8>(simd, sums),
        }
    }

    #[inline(always)]
    fn add<S: Simd, const M: usize>(&self, simd: S, sums: &mut [f64]) {
        if M > N {
            return;
        }
        let stripe = self.at..self.at + VECTORS * S::F64_LANES;
        let mut acc = [[simd.splat_f64s(0.0); VECTORS]; M];
        if !self.begins {
            for (acc, sums) in acc.iter_mut().zip(sums.chunks_exact(TILE)) {
                acc.copy_from_slice(S::as_simd_f64s(&sums[stripe.clone()]).0);
            }
        }
        for (values, weights) in self.values.chunks_exact(TILE).zip(self.weights) {
            let values = S::as_simd_f64s(&values[stripe.clone()]).0;
            for m in 0..M {
                let weight = simd.splat_f64s(weights[m]);
                for v in 0..VECTORS {
                    acc[m][v] = simd.mul_add_f64s(weight, values[v], acc[m][v]);
                }
            }
        }
        for (acc, sums) in acc.iter().zip(sums.chunks_exact_mut(TILE)) {
            S::as_mut_simd_f64s(&mut sums[stripe.clone()]).0.copy_from_slice(acc);
        }
    }
}

/// Cache line. It aligns vectors, so that no load or store crosses a line.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct CacheLine([f64; 8]);

/// Returns zeroed lines for `elements` elements.
fn cache_lines(elements: usize) -> Vec<CacheLine> {
    vec![CacheLine([0.0; 8]); elements.div_ceil(8)]
}
