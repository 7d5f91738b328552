//! The blend: `out[m] = sum_k w[m][k] x[k]`, any number of sources into any number of targets in one pass.
//!
//! Sums are taken in f64, from the first source to the last, and rounded once at the end. With noise gains of tens and
//! weights of both signs, sums in f32 would be off by many ulps; in f64 what is lost is below `K 2^-53 sum |w x|`, far
//! under half an ulp of the output. A source's values are read once, converted in the first-level cache, and added
//! to every target from there. A single target takes four sources at a time straight from their dtype instead: with nothing
//! to share, the way through the cache took as long as the arithmetic (40 f16 sources on two threads: 11 GB/s with it, 16 without).

use safetensors::Dtype;

use super::convert::{bf16_to_f32, f16_to_f32, from_f64, max_finite, to_f64};
use super::f16c;
use super::vectorised;

/// The first-level cache that sums and converted values may fill, in f64.
const CACHED: usize = 3072;

/// Sources converted before they are added: each sum is then loaded and stored once for four of them.
const GROUP: usize = 4;

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
pub struct Unfit {
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
pub fn blend(dst: &mut [&mut [u8]], sources: &[&[u8]], blend: &Blend<'_>) -> Result<(), Unfit> {
    debug_assert_eq!(blend.weights.len(), dst.len() * sources.len());
    vectorised(
        #[inline(always)]
        || blend.run(dst, sources),
    )
}

impl Blend<'_> {
    #[inline(always)]
    fn run(&self, dst: &mut [&mut [u8]], sources: &[&[u8]]) -> Result<(), Unfit> {
        let size = self.output.bitsize() / 8;
        let elements = dst.first().map_or(0, |dst| dst.len() / size);
        let tile = (CACHED / (dst.len() + GROUP)).clamp(64, 512).next_multiple_of(16);
        let mut sums = vec![0.0; dst.len() * tile];
        let mut values = vec![0.0; GROUP * tile];
        for start in (0..elements).step_by(tile) {
            let n = tile.min(elements - start);
            sums.fill(0.0);
            self.add(&mut sums, &mut values, sources, start, n, tile);
            for (m, dst) in dst.iter_mut().enumerate() {
                let sums = &sums[m * tile..][..n];
                self.check(sums, m, start)?;
                from_f64(&mut dst[start * size..][..n * size], sums, self.output);
            }
        }
        Ok(())
    }

    /// Adds all sources to the sums of one tile, in their order.
    #[inline(always)]
    fn add(&self, sums: &mut [f64], values: &mut [f64], sources: &[&[u8]], start: usize, n: usize, tile: usize) {
        for (g, group) in sources.chunks(GROUP).enumerate() {
            let first = g * GROUP;
            let weights = &self.weights[first..first + group.len()];
            if sums.len() == tile && self.add_straight(&mut sums[..n], group, first, start, weights) {
                continue;
            }
            for (k, bytes) in group.iter().enumerate() {
                let dtype = self.dtypes[first + k];
                let size = dtype.bitsize() / 8;
                to_f64(&mut values[k * tile..][..n], &bytes[start * size..][..n * size], dtype);
            }
            for (m, sums) in sums.chunks_mut(tile).enumerate() {
                let weights = &self.weights[m * sources.len() + first..][..group.len()];
                add_group(&mut sums[..n], values, tile, weights);
            }
        }
    }

    /// Adds a whole group of one dtype to the sums of a single target; otherwise does nothing and returns false.
    #[inline(always)]
    fn add_straight(&self, sums: &mut [f64], group: &[&[u8]], first: usize, start: usize, weights: &[f64]) -> bool {
        let (&[a, b, c, d], &[wa, wb, wc, wd]) = (group, weights) else { return false };
        let dtype = self.dtypes[first];
        if self.dtypes[first..first + GROUP].iter().any(|other| *other != dtype) {
            return false;
        }
        let (size, n) = (dtype.bitsize() / 8, sums.len());
        let sources = [a, b, c, d].map(|bytes| &bytes[start * size..(start + n) * size]);
        let weights = [wa, wb, wc, wd];
        match dtype {
            Dtype::F32 => add_values(sums, sources, weights, |x| f64::from(f32::from_le_bytes(x))),
            Dtype::BF16 => add_values(sums, sources, weights, |x| f64::from(bf16_to_f32(u16::from_le_bytes(x)))),
            Dtype::F16 => {
                let done = f16c::add(sums, sources, weights);
                if done == 0 {
                    // Without the instructions the way through the cache, which F16C alone makes short, is the faster.
                    return false;
                }
                let rest = sources.map(|bytes| &bytes[2 * done..]);
                add_values(&mut sums[done..], rest, weights, |x| f64::from(f16_to_f32(u16::from_le_bytes(x))));
            }
            _ => return false,
        }
        true
    }

    #[inline(always)]
    fn check(&self, sums: &[f64], target: usize, start: usize) -> Result<(), Unfit> {
        let limit = max_finite(self.output).unwrap_or(f64::MAX);
        // Not a short-circuiting search: this form vectorises, and it all but never finds anything.
        let fits = sums.iter().fold(true, |fits, x| fits & (x.abs() <= limit));
        if fits {
            return Ok(());
        }
        let element = sums.iter().position(|x| !(x.abs() <= limit)).unwrap_or(0);
        Err(Unfit { target, element: start + element, value: sums[element] })
    }
}

/// Adds four sources to the sums, in their order.
#[inline(always)]
fn add_values<const N: usize>(
    sums: &mut [f64],
    sources: [&[u8]; GROUP],
    [wa, wb, wc, wd]: [f64; GROUP],
    value: impl Fn([u8; N]) -> f64,
) {
    let [a, b, c, d] = sources.map(|bytes| bytes.as_chunks::<N>().0.iter());
    for (sum, ((a, b), (c, d))) in sums.iter_mut().zip(a.zip(b).zip(c.zip(d))) {
        let first = wb.mul_add(value(*b), wa.mul_add(value(*a), *sum));
        *sum = wd.mul_add(value(*d), wc.mul_add(value(*c), first));
    }
}

#[inline(always)]
fn add_group(sums: &mut [f64], values: &[f64], tile: usize, weights: &[f64]) {
    let n = sums.len();
    let row = |k: usize| &values[k * tile..][..n];
    if let &[a, b, c, d] = weights {
        let values = row(0).iter().zip(row(1)).zip(row(2).iter().zip(row(3)));
        for (sum, ((x, y), (z, v))) in sums.iter_mut().zip(values) {
            *sum = d.mul_add(*v, c.mul_add(*z, b.mul_add(*y, a.mul_add(*x, *sum))));
        }
        return;
    }
    for (k, &weight) in weights.iter().enumerate() {
        sums.iter_mut().zip(row(k)).for_each(|(sum, x)| *sum = weight.mul_add(*x, *sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    const ALL: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64];

    fn one(bytes: &[u8], dtype: Dtype, i: usize) -> f64 {
        let mut value = [0.0];
        let size = dtype.bitsize() / 8;
        to_f64(&mut value, &bytes[i * size..][..size], dtype);
        value[0]
    }

    fn encode(values: &[f64], dtype: Dtype) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * dtype.bitsize() / 8];
        from_f64(&mut bytes, values, dtype);
        bytes
    }

    /// The distance between neighbours of `dtype` around `value`.
    fn ulp(value: f64, dtype: Dtype) -> f64 {
        let (digits, smallest) = match dtype {
            Dtype::F16 => (10, -24),
            Dtype::BF16 => (7, -133),
            Dtype::F32 => (23, -149),
            _ => (52, -1074),
        };
        let exponent = if value == 0.0 { smallest } else { value.abs().log2().floor() as i32 };
        2f64.powi((exponent - digits).max(smallest))
    }

    /// A sum of products without rounding error to speak of: errors of both are carried along.
    fn exact_sum(weights: &[f64], values: impl Iterator<Item = f64>) -> f64 {
        let (mut high, mut low) = (0.0, 0.0);
        for (w, x) in weights.iter().zip(values) {
            let product = w * x;
            let sum = high + product;
            let t = sum - high;
            low += (high - (sum - t)) + (product - t) + w.mul_add(x, -product);
            high = sum;
        }
        high + low
    }

    fn check(elements: usize, sources: usize, targets: usize, output: Dtype, shift: usize) {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64((elements * 31 + sources) as u64);
        let dtypes: Vec<Dtype> = (0..sources).map(|k| ALL[k % 4]).collect();
        let stored: Vec<Vec<u8>> = dtypes
            .iter()
            .map(|&dtype| {
                let values: Vec<f64> = (0..elements).map(|_| random.random::<f64>() * 2.0 - 1.0).collect();
                [vec![0u8; shift], encode(&values, dtype)].concat()
            })
            .collect();
        let stored: Vec<&[u8]> = stored.iter().map(|bytes| &bytes[shift..]).collect();
        // Weights of both signs and a noise gain of tens, as synthesis has them.
        let weights: Vec<f64> = (0..sources * targets).map(|_| random.random::<f64>() * 40.0 - 20.0).collect();
        let size = output.bitsize() / 8;
        let mut results = vec![vec![0xa5u8; shift + elements * size + 5]; targets];
        let mut dst: Vec<&mut [u8]> = results.iter_mut().map(|r| &mut r[shift..shift + elements * size]).collect();
        blend(&mut dst, &stored, &Blend { dtypes: &dtypes, weights: &weights, output }).unwrap();
        for (m, result) in results.iter().enumerate() {
            let weights = &weights[m * sources..][..sources];
            for i in 0..elements {
                let exact = exact_sum(weights, stored.iter().zip(&dtypes).map(|(b, &d)| one(b, d, i)));
                let got = one(&result[shift..], output, i);
                // For f64 the sum itself rounds: K 2^-53 of the sum of magnitudes.
                let rounding =
                    if output == Dtype::F64 { sources as f64 * 20.0 * f64::EPSILON * sources as f64 } else { 0.0 };
                let difference = (got - exact).abs();
                assert!(difference <= ulp(exact, output) + rounding, "{output} {i}: {got} {exact}");
            }
            assert!(result[..shift].iter().chain(&result[shift + elements * size..]).all(|&b| b == 0xa5));
        }
    }

    #[test]
    fn every_length_is_within_an_ulp_of_the_exact_sum() {
        for elements in 0..70 {
            for output in ALL {
                check(elements, 9, 2, output, elements % 3);
            }
        }
    }

    #[test]
    fn any_number_of_sources_and_targets() {
        for sources in [1, 2, 3, 4, 5, 8, 40] {
            for targets in [1, 2, 7, 31] {
                check(530, sources, targets, Dtype::F32, 1);
            }
        }
        check(4097, 40, 5, Dtype::F16, 0);
    }

    #[test]
    fn results_do_not_depend_on_the_stretch() {
        let values: Vec<f64> = (0..3000).map(|i| f64::from(i).sin()).collect();
        let stored: Vec<Vec<u8>> = ALL.iter().map(|&dtype| encode(&values, dtype)).collect();
        let weights = [0.3, -1.7, 2.9, -0.5];
        let task = Blend { dtypes: &ALL, weights: &weights, output: Dtype::F32 };
        let sources: Vec<&[u8]> = stored.iter().map(Vec::as_slice).collect();
        let mut whole = vec![0u8; 12_000];
        blend(&mut [&mut whole], &sources, &task).unwrap();
        for cut in [1, 17, 512, 1999] {
            let mut pieces = vec![0u8; 12_000];
            let (head, tail) = pieces.split_at_mut(4 * cut);
            let part = |range: std::ops::Range<usize>| -> Vec<&[u8]> {
                let bytes = |d: Dtype| d.bitsize() / 8;
                stored.iter().zip(ALL).map(|(s, d)| &s[range.start * bytes(d)..range.end * bytes(d)]).collect()
            };
            blend(&mut [head], &part(0..cut), &task).unwrap();
            blend(&mut [tail], &part(cut..3000), &task).unwrap();
            assert_eq!(pieces, whole);
        }
    }

    #[test]
    fn sums_that_do_not_fit_are_reported() {
        let values = encode(&[1.0, 70_000.0, f64::NAN], Dtype::F32);
        let mut out = [0u8; 12];
        let task = |output| Blend { dtypes: &[Dtype::F32], weights: &[1.0], output };
        let unfit = blend(&mut [&mut out[..6]], &[&values], &task(Dtype::F16)).unwrap_err();
        assert_eq!((unfit.element, unfit.value), (1, 70_000.0));
        let unfit = blend(&mut [&mut out], &[&values], &task(Dtype::F32)).unwrap_err();
        assert!(unfit.element == 2 && unfit.value.is_nan());
    }

    /// What a single target takes straight from the sources, and what several share through the cache, are the same bits.
    #[test]
    fn a_target_alone_has_the_bits_of_one_among_others() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        for dtype in ALL {
            for elements in (0..70).chain([511, 512, 513, 1500]) {
                for (sources, shift) in [(4, 0), (9, 1), (12, 3)] {
                    let size = dtype.bitsize() / 8;
                    let mut stored = |_| {
                        let values: Vec<f64> = (0..elements).map(|_| random.random::<f64>() * 2.0 - 1.0).collect();
                        [vec![0u8; shift], encode(&values, dtype)].concat()
                    };
                    let stored: Vec<Vec<u8>> = (0..sources).map(&mut stored).collect();
                    let stored: Vec<&[u8]> = stored.iter().map(|bytes| &bytes[shift..]).collect();
                    let weights: Vec<f64> = (0..2 * sources).map(|_| random.random::<f64>() * 40.0 - 20.0).collect();
                    let dtypes = vec![dtype; sources];
                    let (mut alone, mut first, mut second) =
                        (vec![0x55u8; 8 * elements], vec![0xaau8; 8 * elements], vec![0u8; 8 * elements]);
                    let of = |weights| Blend { dtypes: &dtypes, weights, output: Dtype::F64 };
                    blend(&mut [&mut alone], &stored, &of(&weights[..sources])).unwrap();
                    blend(&mut [&mut first, &mut second], &stored, &of(&weights)).unwrap();
                    assert_eq!(alone, first, "{dtype} of {size} bytes, {elements} elements, {sources} sources");
                }
            }
        }
    }
}
