//! Update of all profiles in one pass over the parameters.
//!
//! Plain:       `e <- fma(w, p - e, e)`.
//! Compensated: `d = fma(w, p - e, c); s = e + d; c <- round(d - (s - e)); e <- s`. The low-order term `c` holds the
//! rounding error of the sum, so increments below half an ulp of `e` are not lost. It is stored as an integer: see
//! [`low_order`].
//!
//! A tile of parameters is converted to f32 and folded into the averages of every profile while it is in registers.
//! Memory traffic per parameter is 2 to 8 bytes read, plus 8 (plain) or 12 (compensated) bytes read and written per
//! profile. Every stream is prefetched: with five streams read and four written, the hardware prefetcher alone reaches
//! three quarters of this rate.

use rayon::prelude::*;
use safetensors::Dtype;

use super::convert::to_f32_with;
use super::{Averages, CHUNK, Layout, SimdLevel, low_order, prefetch};

/// Number of parameters per tile: whole cache lines of every stream, and few enough for registers.
const TILE: usize = 64;

/// New parameters of one tensor.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// Dtype of the elements, which is averaged.
    pub dtype: Dtype,
    /// Elements, at any alignment.
    pub bytes: &'a [u8],
}

/// Weights of one update.
#[derive(Clone, Copy, Debug)]
pub struct UpdateWeights<'a> {
    /// `1 - beta` of each profile.
    pub each: &'a [f32],
    /// Threshold of the update, by which low-order terms are rounded: see [`low_order`].
    pub threshold: u32,
}

impl<'a> UpdateWeights<'a> {
    /// Returns the weights of the update at `time`, which differs from update to update.
    pub fn at(time: u64, each: &'a [f32]) -> UpdateWeights<'a> {
        UpdateWeights { each, threshold: low_order::threshold(time) }
    }
}

/// Folds new parameters into the averages of every profile.
///
/// `incoming` holds one entry for each tensor of `layout`, with the same number of elements.
pub fn update(averages: &mut [Averages], incoming: &[Incoming<'_>], layout: &Layout, weights: UpdateWeights<'_>) {
    update_with(SimdLevel::best(), averages, incoming, layout, weights);
}

/// As [`update`], with the instructions of `level`.
pub fn update_with(
    level: SimdLevel,
    averages: &mut [Averages],
    incoming: &[Incoming<'_>],
    layout: &Layout,
    weights: UpdateWeights<'_>,
) {
    debug_assert_eq!(averages.len(), weights.each.len());
    debug_assert_eq!(incoming.len(), layout.len());
    split_into_chunks(averages, incoming, layout).into_par_iter().for_each(|chunk| {
        level.run(
            #[inline(always)]
            || chunk.update(level, weights),
        );
    });
}

/// Elements of one tensor, with their averages under every profile.
struct UpdateChunk<'a> {
    incoming: Incoming<'a>,
    averages: Vec<AveragesSlice<'a>>,
}

/// Elements of the averages of one profile.
struct AveragesSlice<'a> {
    high: &'a mut [f32],
    low: Option<&'a mut [i16]>,
}

impl<'a> AveragesSlice<'a> {
    /// Splits off and returns the first `n` elements.
    fn split_off(&mut self, n: usize) -> AveragesSlice<'a> {
        let high = self.high.split_off_mut(..n).unwrap_or_default();
        let low = self.low.as_mut().map(|low| low.split_off_mut(..n).unwrap_or_default());
        AveragesSlice { high, low }
    }
}

/// Splits all tensors into chunks that threads update independently.
fn split_into_chunks<'a>(
    averages: &'a mut [Averages],
    incoming: &[Incoming<'a>],
    layout: &Layout,
) -> Vec<UpdateChunk<'a>> {
    let mut rest: Vec<AveragesSlice<'a>> =
        averages.iter_mut().map(|a| AveragesSlice { high: &mut a.high, low: a.low.as_deref_mut() }).collect();
    let mut chunks = Vec::new();
    let mut end = 0;
    for (i, tensor) in incoming.iter().enumerate() {
        let range = layout.range(i);
        for averages in &mut rest {
            averages.split_off(range.start - end);
        }
        let size = tensor.dtype.bitsize() / 8;
        for bytes in tensor.bytes.chunks(CHUNK * size) {
            let averages = rest.iter_mut().map(|averages| averages.split_off(bytes.len() / size)).collect();
            chunks.push(UpdateChunk { incoming: Incoming { bytes, ..*tensor }, averages });
        }
        end = range.end;
    }
    chunks
}

impl UpdateChunk<'_> {
    #[inline(always)]
    fn update(mut self, level: SimdLevel, weights: UpdateWeights<'_>) {
        match self.incoming.dtype {
            Dtype::F32 => self.fold_tiles::<4>(level, weights, Dtype::F32),
            Dtype::F16 => self.fold_tiles::<2>(level, weights, Dtype::F16),
            Dtype::BF16 => self.fold_tiles::<2>(level, weights, Dtype::BF16),
            Dtype::F64 => self.fold_tiles::<8>(level, weights, Dtype::F64),
            other => unreachable!("{other} is not averaged"),
        }
    }

    /// Folds all elements, which have `N` bytes each.
    #[inline(always)]
    fn fold_tiles<const N: usize>(&mut self, level: SimdLevel, weights: UpdateWeights<'_>, dtype: Dtype) {
        let elements = self.incoming.bytes.as_chunks::<N>().0;
        let (whole, rest) = elements.as_chunks::<TILE>();
        let mut parameters = [0.0; TILE];
        for (i, tile) in whole.iter().enumerate() {
            prefetch::for_reading(tile);
            to_f32_with(level, &mut parameters, tile.as_flattened(), dtype);
            for (averages, &weight) in self.averages.iter_mut().zip(weights.each) {
                averages.fold_tile(i, &parameters, weight, weights.threshold);
            }
        }
        let parameters = &mut parameters[..rest.len()];
        to_f32_with(level, parameters, rest.as_flattened(), dtype);
        for (averages, &weight) in self.averages.iter_mut().zip(weights.each) {
            averages.fold(whole.len() * TILE, parameters, weight, weights.threshold);
        }
    }
}

impl AveragesSlice<'_> {
    /// Folds the parameters of tile `i`.
    #[inline(always)]
    fn fold_tile(&mut self, i: usize, parameters: &[f32; TILE], weight: f32, threshold: u32) {
        let high = &mut self.high.as_chunks_mut::<TILE>().0[i];
        prefetch::for_writing(high);
        match &mut self.low {
            Some(low) => {
                let low = &mut low.as_chunks_mut::<TILE>().0[i];
                prefetch::for_writing(low);
                compensated(high, low, parameters, weight, threshold);
            }
            None => plain(high, parameters, weight),
        }
    }

    /// Folds fewer parameters than a tile, from element `start` on.
    #[inline(always)]
    fn fold(&mut self, start: usize, parameters: &[f32], weight: f32, threshold: u32) {
        let range = start..start + parameters.len();
        let high = &mut self.high[range.clone()];
        match &mut self.low {
            Some(low) => compensated(high, &mut low[range], parameters, weight, threshold),
            None => plain(high, parameters, weight),
        }
    }
}

#[inline(always)]
fn plain(high: &mut [f32], parameters: &[f32], weight: f32) {
    for (e, &p) in high.iter_mut().zip(parameters) {
        *e = weight.mul_add(p - *e, *e);
    }
}

#[inline(always)]
pub(super) fn compensated(high: &mut [f32], low: &mut [i16], parameters: &[f32], weight: f32, threshold: u32) {
    for ((e, c), &p) in high.iter_mut().zip(low).zip(parameters) {
        let increment = weight.mul_add(p - *e, low_order::decode(*e, *c));
        let sum = *e + increment;
        *c = low_order::encode(sum, increment - (sum - *e), threshold);
        *e = sum;
    }
}

#[cfg(test)]
mod tests {
    use super::super::Precision;
    use super::super::convert::to_f32;
    use super::*;
    use rand::{Rng, SeedableRng};

    /// Updates one element by the definition.
    fn oracle(high: &mut f32, low: Option<&mut i16>, p: f32, w: f32, threshold: u32) {
        let Some(low) = low else {
            *high = w.mul_add(p - *high, *high);
            return;
        };
        let d = w.mul_add(p - *high, (f64::from(*low) * unit(*high)) as f32);
        let s = *high + d;
        let fine = f64::from(d - (s - *high)) / unit(s) * 64.0;
        *low = ((fine.round_ties_even() + f64::from(threshold)) / 64.0).floor() as i16;
        *high = s;
    }

    /// Returns the unit of a value's low-order term: `2^(E - 37)` for `2^E <= |value| < 2^(E + 1)`.
    fn unit(value: f32) -> f64 {
        let exponent = (value.to_bits() >> 23 & 0xff) as i32;
        f64::from(exponent.max(1) - 127 - 37).exp2()
    }

    fn element(bytes: &[u8], dtype: Dtype, i: usize) -> f32 {
        let mut value = [0.0];
        let size = dtype.bitsize() / 8;
        to_f32(&mut value, &bytes[i * size..][..size], dtype);
        value[0]
    }

    /// Returns random values between -2 and 2.
    fn random_bytes(random: &mut impl Rng, dtype: Dtype, elements: usize) -> Vec<u8> {
        let value = |random: &mut dyn FnMut() -> f32| random() * 4.0 - 2.0;
        let mut next = || random.random::<f32>();
        (0..elements)
            .flat_map(|_| match dtype {
                Dtype::F32 => value(&mut next).to_le_bytes().to_vec(),
                Dtype::F64 => f64::from(value(&mut next)).to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f32(value(&mut next)).to_le_bytes().to_vec(),
                _ => half::bf16::from_f32(value(&mut next)).to_le_bytes().to_vec(),
            })
            .collect()
    }

    fn check(lengths: &[usize], dtypes: &[Dtype], profiles: usize, precision: Precision, shift: usize) {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        let layout = Layout::new(lengths.iter().copied());
        let mut expected = vec![Averages::zeros(&layout, precision); profiles];
        let mut by_level = vec![expected.clone(); SimdLevel::all().len()];
        for step in 0..3 {
            let threshold = 21 * step;
            let weights: Vec<f32> = (0..profiles).map(|p| if step == 0 { 1.0 } else { 0.3 / (p + 1) as f32 }).collect();
            let tensors: Vec<(Dtype, Vec<u8>)> = lengths
                .iter()
                .enumerate()
                .map(|(i, &n)| {
                    let dtype = dtypes[i % dtypes.len()];
                    let mut bytes = vec![0; shift];
                    bytes.extend(random_bytes(&mut random, dtype, n));
                    (dtype, bytes)
                })
                .collect();
            let incoming: Vec<Incoming<'_>> =
                tensors.iter().map(|(dtype, bytes)| Incoming { dtype: *dtype, bytes: &bytes[shift..] }).collect();
            for (level, averages) in SimdLevel::all().into_iter().zip(&mut by_level) {
                update_with(level, averages, &incoming, &layout, UpdateWeights { each: &weights, threshold });
            }
            for (averages, &w) in expected.iter_mut().zip(&weights) {
                for (i, tensor) in incoming.iter().enumerate() {
                    for (j, at) in layout.range(i).enumerate() {
                        let low = averages.low.as_mut().map(|low| &mut low[at]);
                        oracle(&mut averages.high[at], low, element(tensor.bytes, tensor.dtype, j), w, threshold);
                    }
                }
            }
        }
        for (got, expected) in by_level.iter().flat_map(|averages| averages.iter().zip(&expected)) {
            let bits = |a: &Averages| a.high.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(got), bits(expected));
            assert_eq!(got.low, expected.low);
        }
    }

    const ALL: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64];

    #[test]
    fn update_equals_oracle_for_every_length_dtype_and_precision() {
        for profiles in [1, 2, 3, 8] {
            for precision in [Precision::Plain, Precision::Compensated] {
                for shift in [0, 1, 3] {
                    check(&(0..70).collect::<Vec<_>>(), &ALL, profiles, precision, shift);
                }
            }
        }
    }

    #[test]
    fn update_equals_oracle_around_tiles_and_chunks() {
        let lengths = [TILE - 1, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5];
        for precision in [Precision::Plain, Precision::Compensated] {
            for dtype in ALL {
                check(&lengths, &[dtype], 2, precision, 0);
            }
        }
    }

    #[test]
    fn first_update_copies_parameters() {
        let values = [1.5f32, -0.25, 1e-30, 3e38];
        let layout = Layout::new([values.len()]);
        for precision in [Precision::Plain, Precision::Compensated] {
            let mut averages = [Averages::zeros(&layout, precision)];
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            update(
                &mut averages,
                &[Incoming { dtype: Dtype::F32, bytes: &bytes }],
                &layout,
                UpdateWeights::at(1, &[1.0]),
            );
            assert_eq!(averages[0].high, values);
            assert!(averages[0].low.iter().flatten().all(|&term| term == 0));
        }
    }

    /// Updates through zeros, changes of sign, powers of two, subnormal numbers and the largest ones.
    #[test]
    fn update_of_extreme_values_equals_oracle() {
        const NUMBERS: [f32; 14] = [
            0.0,
            -0.0,
            1.0,
            0.999_999_9,
            -1.0,
            2.0,
            1.999_999_9,
            1e-30,
            f32::MIN_POSITIVE,
            -1e-40,
            1e-45,
            f32::MAX,
            1.7e38,
            -1e30,
        ];
        let layout = Layout::new([NUMBERS.len() * NUMBERS.len()]);
        let first: Vec<f32> = NUMBERS.iter().flat_map(|&number| [number; NUMBERS.len()]).collect();
        for level in SimdLevel::all() {
            let mut averages = [Averages::zeros(&layout, Precision::Compensated)];
            let mut expected = averages[0].clone();
            for step in 0..200u32 {
                let weight = if step == 0 { 1.0 } else { [1e-3, 0.5, 1e-7, 0.9][step as usize % 4] };
                let shift = step as usize / 50;
                let values: Vec<f32> = match step {
                    0 => first.clone(),
                    _ => (0..first.len()).map(|i| NUMBERS[(i + shift) % NUMBERS.len()] * 0.5).collect(),
                };
                let incoming = Incoming { dtype: Dtype::F32, bytes: bytemuck::cast_slice(&values) };
                let weights = UpdateWeights { each: &[weight], threshold: step % 64 };
                update_with(level, &mut averages, &[incoming], &layout, weights);
                let low = expected.low.as_mut().unwrap();
                for ((high, low), &value) in expected.high.iter_mut().zip(low).zip(&values) {
                    oracle(high, Some(low), value, weight, step % 64);
                }
            }
            assert!(averages[0].high.iter().all(|value| value.is_finite()));
            let bits = |a: &Averages| a.high.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&averages[0]), bits(&expected), "{}", level.name());
            assert_eq!(averages[0].low, expected.low, "{}", level.name());
        }
    }

    #[test]
    fn averages_that_are_not_finite_stay_so() {
        let layout = Layout::new([3]);
        for level in SimdLevel::all() {
            let mut averages = [Averages::zeros(&layout, Precision::Compensated)];
            for step in 1..=3 {
                let values = if step == 1 { [f32::NAN, f32::INFINITY, 1.0] } else { [1.0; 3] };
                let incoming = Incoming { dtype: Dtype::F32, bytes: bytemuck::cast_slice(&values) };
                let each = [if step == 1 { 1.0 } else { 0.5 }];
                let weights = UpdateWeights::at(step, &each);
                update_with(level, &mut averages, &[incoming], &layout, weights);
                assert_eq!(
                    averages[0].high[..3].iter().map(|value| value.is_finite()).collect::<Vec<_>>(),
                    [false, false, true]
                );
                assert_eq!((averages[0].high[2], averages[0].low.as_ref().unwrap()[2]), (1.0, 0));
            }
        }
    }
}
