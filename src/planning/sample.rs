//! A sample of stored snapshots, from which the error of a blend is predicted.

use std::ops::Range;

use rayon::prelude::*;
use safetensors::Dtype;

use super::noise::PredictedError;
use super::source::IndexedSource;
use crate::compute::cpu::to_f32;
use crate::error::Result;
use crate::math::noise::{ErrorModel, Measured, RegularisedSolution, Sample, measure};
use crate::math::{Profile, Solution, System};
use crate::snapshot::Snapshot;
use crate::tensor::{TensorSpec, is_averaged};

/// Fewest steps of snapshots that separate drift, walk and noise.
const FEWEST_STEPS: usize = 3;

/// Smallest and largest number of elements of a sample.
const ELEMENTS: (usize, usize) = (256, 4_096);

/// Largest product of pairs of snapshots and elements of a sample: a tenth of a second of work.
const WORK: usize = 1 << 27;

/// Number of blocks of elements that a sample is taken from, spread over the model.
const BLOCKS: usize = 16;

/// Movement and rounding of a run's snapshots, measured on a sample.
#[derive(Debug)]
pub(crate) struct SnapshotNoise {
    measured: Measured,
    /// The root mean square of each snapshot's weights.
    sizes: Vec<f64>,
}

impl SnapshotNoise {
    /// Samples snapshots; `None` if they are of too few steps or nothing is averaged.
    pub(crate) fn of(snapshots: &[Snapshot], averaged: &[TensorSpec]) -> Option<SnapshotNoise> {
        let mut steps: Vec<u64> = snapshots.iter().map(|snapshot| snapshot.id.step).collect();
        steps.sort_unstable();
        steps.dedup();
        if steps.len() < FEWEST_STEPS {
            return None;
        }
        let sample = sample(snapshots, averaged)?;
        let size = |values: &Vec<f64>| (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt();
        Some(SnapshotNoise { sizes: sample.values.iter().map(size).collect(), measured: measure(&sample) })
    }

    /// Returns the error model of a system of the sources `usable`; `None` if there is too little to predict from.
    pub(crate) fn model<'a>(
        &self,
        system: &'a System,
        sources: &[IndexedSource],
        usable: &[usize],
    ) -> Option<RelativeErrorModel<'a>> {
        let mut steps: Vec<u64> = usable.iter().map(|&i| sources[i].step).collect();
        steps.sort_unstable();
        steps.dedup();
        let newest = usable.iter().filter(|&&i| Some(&sources[i].step) == steps.last());
        let size = newest.map(|&i| self.sizes[i]).fold(0.0, f64::max);
        if steps.len() < FEWEST_STEPS || !(size > 0.0) {
            return None;
        }
        let model = ErrorModel::new(system, self.measured.subset(usable))?;
        Some(RelativeErrorModel { model, size })
    }
}

/// A model of errors relative to the size of the weights.
pub(crate) struct RelativeErrorModel<'a> {
    model: ErrorModel<'a>,
    /// The root mean square of the newest snapshot's weights; the largest of several snapshots.
    size: f64,
}

impl RelativeErrorModel<'_> {
    /// Solves with the system's own regularisation, `rho`.
    pub(crate) fn solve(&self, profile: &Profile, rho: f64) -> Result<(Solution, f64, PredictedError)> {
        self.model.solve(profile, rho).map(|solved| self.relative(solved))
    }

    /// Solves with the regularisation of the smallest predicted error.
    pub(crate) fn solve_best(&self, profile: &Profile) -> Result<(Solution, f64, PredictedError)> {
        self.model.solve_best(profile).map(|solved| self.relative(solved))
    }

    fn relative(&self, solved: RegularisedSolution) -> (Solution, f64, PredictedError) {
        let RegularisedSolution { solution, rho, expected } = solved;
        let predicted = PredictedError {
            profile: expected.profile / self.size,
            rounding: expected.rounding / self.size,
            total: expected.total() / self.size,
        };
        (solution, rho, predicted)
    }
}

/// Contiguous elements of one tensor.
#[derive(Debug)]
struct Segment {
    tensor: usize,
    elements: Range<usize>,
}

/// Reads the same elements of all snapshots, in segments spread evenly over all averaged tensors.
///
/// Returns `None` if a value is not finite or there are none.
fn sample(snapshots: &[Snapshot], averaged: &[TensorSpec]) -> Option<Sample> {
    let counts: Vec<usize> = averaged.iter().map(|tensor| tensor.shape.iter().product()).collect();
    let pairs = snapshots.len() * snapshots.len();
    let segments = segments(&counts, (WORK / pairs).clamp(ELEMENTS.0, ELEMENTS.1));
    let read = |snapshot: &Snapshot| snapshot.sparsely(|| read_segments(snapshot, averaged, &segments));
    let read: Vec<(Vec<f64>, Vec<f64>)> = snapshots.par_iter().map(read).collect::<Option<_>>()?;
    let (values, ulps): (Vec<_>, Vec<_>) = read.into_iter().unzip();
    let mut blocks = Vec::with_capacity(segments.len());
    let mut start = 0;
    for segment in &segments {
        let end = start + segment.elements.len();
        blocks.push(start..end);
        start = end;
    }
    let finite = values.iter().flatten().all(|value| value.is_finite());
    (finite && !values.first()?.is_empty()).then_some(Sample { values, ulps, blocks })
}

/// Returns `BLOCKS` blocks of about `elements` elements in all, cut into segments at the ends of tensors.
fn segments(counts: &[usize], elements: usize) -> Vec<Segment> {
    let total: usize = counts.iter().sum();
    let length = total.div_ceil(BLOCKS).min(elements / BLOCKS);
    let mut segments = Vec::new();
    for block in 0..BLOCKS {
        // The first block begins at the first element, and the last one ends at the last.
        let start = ((total - length) as u128 * block as u128 / (BLOCKS - 1) as u128) as usize;
        let end = start + length;
        let mut first = 0;
        for (tensor, &count) in counts.iter().enumerate() {
            let from = start.clamp(first, first + count);
            let until = end.clamp(first, first + count);
            if from < until {
                segments.push(Segment { tensor, elements: from - first..until - first });
            }
            first += count;
        }
    }
    segments
}

/// Reads values and `ulp`s of the segments in one snapshot; `None` if a tensor is missing or not floating-point.
fn read_segments(snapshot: &Snapshot, tensors: &[TensorSpec], segments: &[Segment]) -> Option<(Vec<f64>, Vec<f64>)> {
    let count = segments.iter().map(|segment| segment.elements.len()).sum();
    let mut values = Vec::with_capacity(count);
    let mut ulps = Vec::with_capacity(count);
    for Segment { tensor, elements } in segments {
        let (stored, bytes) = snapshot.tensor(&tensors[*tensor].name)?;
        let dtype = stored.dtype;
        let size = dtype.bitsize() / 8;
        let start = values.len();
        append(&mut values, dtype, bytes.get(elements.start * size..elements.end * size)?)?;
        ulps.extend(values[start..].iter().map(|&value| ulp(dtype, value)));
    }
    Some((values, ulps))
}

/// Appends floating-point elements, which f64 holds exactly; `None` for other dtypes.
fn append(values: &mut Vec<f64>, dtype: Dtype, bytes: &[u8]) -> Option<()> {
    if dtype == Dtype::F64 {
        values.extend(bytes.as_chunks().0.iter().map(|&element| f64::from_le_bytes(element)));
        return Some(());
    }
    let mut exact = is_averaged(dtype).then(|| vec![0.0f32; bytes.len() * 8 / dtype.bitsize()])?;
    to_f32(&mut exact, bytes, dtype);
    values.extend(exact.into_iter().map(f64::from));
    Some(())
}

/// Returns the distance of neighbouring values of `dtype` at `value`.
fn ulp(dtype: Dtype, value: f64) -> f64 {
    // Bits of the fraction, and the exponent of the smallest subnormal number.
    let (digits, least) = match dtype {
        Dtype::F16 => (10, -24),
        Dtype::BF16 => (7, -133),
        Dtype::F32 => (23, -149),
        _ => (52, -1074),
    };
    let exponent = (value.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    power_of_two((exponent - digits).max(least))
}

/// Returns `2^exponent`, for exponents from -1074 on.
fn power_of_two(exponent: i32) -> f64 {
    // The exponent of a normal number, or the one bit of a subnormal number.
    let bits = if exponent > -1023 { ((exponent + 1023) as u64) << 52 } else { 1 << (exponent + 1074) };
    f64::from_bits(bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn elements_are_read_exactly() {
        let numbers = [0.0, -1.5, 3.0e-7, 60_000.0, -0.125, 2.0];
        let bytes = |element: &dyn Fn(f64) -> Vec<u8>| numbers.iter().flat_map(|&x| element(x)).collect::<Vec<u8>>();
        let cases = [
            (Dtype::F64, bytes(&|x| x.to_le_bytes().to_vec()), numbers),
            (Dtype::F32, bytes(&|x| (x as f32).to_le_bytes().to_vec()), numbers.map(|x| f64::from(x as f32))),
            (Dtype::F16, bytes(&|x| f16::from_f64(x).to_le_bytes().to_vec()), numbers.map(|x| f16::from_f64(x).into())),
            (
                Dtype::BF16,
                bytes(&|x| bf16::from_f64(x).to_le_bytes().to_vec()),
                numbers.map(|x| bf16::from_f64(x).into()),
            ),
        ];
        for (dtype, bytes, expected) in cases {
            let mut values = vec![7.0];
            append(&mut values, dtype, &bytes).unwrap();
            assert!(values[0] == 7.0 && values[1..] == expected, "{dtype}: {values:?}");
        }
        assert_eq!(append(&mut Vec::new(), Dtype::I64, &[0; 8]), None);
    }

    #[test]
    fn powers_of_two_are_exact() {
        let mut down = 1.0;
        let mut up = 1.0;
        for exponent in 0..=1074 {
            assert_eq!(power_of_two(-exponent), down, "{exponent}");
            down *= 0.5;
        }
        for exponent in 0..1024 {
            assert_eq!(power_of_two(exponent), up, "{exponent}");
            up *= 2.0;
        }
    }

    #[test]
    fn ulp_equals_the_distance_to_the_next_value() {
        for bits in (0..0x7bff_u16).step_by(7) {
            let value = f16::from_bits(bits).to_f64();
            let next = f16::from_bits(bits + 1).to_f64();
            assert_eq!(ulp(Dtype::F16, -value), next - value, "{value}");
        }
        for bits in (0..0x7f7f_u16).step_by(7) {
            let value = bf16::from_bits(bits).to_f64();
            let next = bf16::from_bits(bits + 1).to_f64();
            assert_eq!(ulp(Dtype::BF16, value), next - value, "{value}");
        }
        for value in [0.0f32, 1e-40, 1e-3, 1.0, 1.999, 3e38] {
            assert_eq!(ulp(Dtype::F32, value.into()), f64::from(value.next_up()) - f64::from(value), "{value}");
        }
        for value in [1e-300f64, 0.1, 1.0, 1e300] {
            assert_eq!(ulp(Dtype::F64, value), value.next_up() - value, "{value}");
        }
    }

    #[test]
    fn segments_are_spread_over_the_model_and_within_its_tensors() {
        for counts in [vec![1], vec![3, 0, 5], vec![100_000], vec![7; 5000], vec![1 << 40, 10]] {
            let total: usize = counts.iter().sum();
            let cut = segments(&counts, ELEMENTS.1);
            for Segment { tensor, elements } in &cut {
                assert!(elements.end <= counts[*tensor] && !elements.is_empty(), "{counts:?}");
            }
            let length: usize = cut.iter().map(|segment| segment.elements.len()).sum();
            assert!(length <= ELEMENTS.1.max(2 * BLOCKS) && length >= total.min(ELEMENTS.1), "{length} of {total}");
        }
        let cut = segments(&[1 << 40], ELEMENTS.1);
        assert!(cut[0].elements.start == 0 && cut[15].elements.end > (1 << 40) - 16 && cut.len() == BLOCKS);
        assert!(segments(&[], ELEMENTS.1).is_empty());
    }
}
