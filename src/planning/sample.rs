//! A sample of averages, from which the error of a blend is predicted.

use std::ops::Range;

use rayon::prelude::*;
use safetensors::Dtype;

use super::segments::{Segment, segments};
use crate::compute::cpu::to_f32;
use crate::math::noise::Sample;
use crate::snapshot::Snapshot;
use crate::tensor::{TensorSpec, is_averaged};

/// Smallest and largest number of elements of a sample.
const ELEMENTS: (usize, usize) = (256, 16_384);

/// Largest product of pairs of snapshots and elements of a sample: a few hundredths of a second of work.
const WORK: usize = 1 << 25;

/// A sample of every tensor.
pub(super) struct ModelSample {
    pub sample: Sample,
    pub tensors: Vec<SampledTensor>,
}

/// The sampled elements of one tensor.
pub(super) struct SampledTensor {
    /// Index among the averaged tensors.
    pub index: usize,
    /// Number of elements of the tensor.
    pub count: usize,
    /// The range of its elements in the sample.
    pub elements: Range<usize>,
}

/// An average whose elements can be sampled.
pub(crate) trait SampledSource: Sync {
    /// Reads segments of tensors, in their order; `None` if a tensor is missing or is not floating-point.
    fn read_segments(&self, tensors: &[TensorSpec], segments: &[Segment]) -> Option<SampledElements>;
}

/// Elements of one average.
#[derive(Debug, Default)]
pub(crate) struct SampledElements {
    values: Vec<f64>,
    /// The distances of neighbouring values of the dtype.
    ulps: Vec<f64>,
    /// Memory for elements in f32, which is used again and again.
    exact: Vec<f32>,
}

impl SampledElements {
    /// Appends elements as they are in memory; `None` if they are not floating-point.
    pub(crate) fn append(&mut self, dtype: Dtype, bytes: &[u8]) -> Option<()> {
        let start = self.values.len();
        append(&mut self.values, &mut self.exact, dtype, bytes)?;
        self.ulps.extend(self.values[start..].iter().map(|&value| ulp(dtype, value)));
        Some(())
    }
}

/// Reads the same elements of all averages, in segments of each averaged tensor.
///
/// Returns `None` if a value is not finite or there are none.
pub(super) fn sample(sources: &[&dyn SampledSource], averaged: &[TensorSpec]) -> Option<ModelSample> {
    let counts: Vec<usize> = averaged.iter().map(|tensor| tensor.shape.iter().product()).collect();
    let pairs = sources.len() * sources.len() / 2;
    let segments = segments(&counts, (WORK / pairs.max(1)).clamp(ELEMENTS.0, ELEMENTS.1));
    let read = |source: &&dyn SampledSource| source.read_segments(averaged, &segments);
    let read: Vec<SampledElements> = sources.par_iter().map(read).collect::<Option<_>>()?;
    let (values, ulps): (Vec<_>, Vec<_>) = read.into_iter().map(|read| (read.values, read.ulps)).unzip();
    let mut tensors = Vec::new();
    let mut weights = Vec::new();
    for segments in segments.chunk_by(|a, b| a.tensor == b.tensor) {
        let index = segments[0].tensor;
        let sampled: usize = segments.iter().map(|segment| segment.elements.len()).sum();
        let start = weights.len();
        weights.resize(start + sampled, counts[index] as f64 / sampled as f64);
        tensors.push(SampledTensor { index, count: counts[index], elements: start..start + sampled });
    }
    let finite = values.iter().flatten().all(|value| value.is_finite());
    (finite && !tensors.is_empty()).then_some(ModelSample { sample: Sample { values, ulps, weights }, tensors })
}

impl SampledSource for Snapshot {
    fn read_segments(&self, tensors: &[TensorSpec], segments: &[Segment]) -> Option<SampledElements> {
        let mut reader = self.scattered();
        let mut sampled = SampledElements::default();
        for segments in segments.chunk_by(|a, b| a.tensor == b.tensor) {
            let ranges = segments.iter().map(|segment| segment.elements.clone());
            let append = |dtype, bytes: &[u8]| sampled.append(dtype, bytes);
            reader.read(&tensors[segments[0].tensor].name, ranges, append)?;
        }
        Some(sampled)
    }
}

/// Appends floating-point elements, which f64 holds exactly; `None` for other dtypes.
fn append(values: &mut Vec<f64>, exact: &mut Vec<f32>, dtype: Dtype, bytes: &[u8]) -> Option<()> {
    if dtype == Dtype::F64 {
        values.extend(bytes.as_chunks().0.iter().map(|&element| f64::from_le_bytes(element)));
        return Some(());
    }
    is_averaged(dtype).then_some(())?;
    exact.resize(bytes.len() * 8 / dtype.bitsize(), 0.0);
    to_f32(exact, bytes, dtype);
    values.extend(exact.iter().copied().map(f64::from));
    Some(())
}

/// Returns the distance of neighbouring values of `dtype` at `value`.
pub(super) fn ulp(dtype: Dtype, value: f64) -> f64 {
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
        let mut exact = Vec::new();
        for (dtype, bytes, expected) in cases {
            let mut values = vec![7.0];
            append(&mut values, &mut exact, dtype, &bytes).unwrap();
            assert!(values[0] == 7.0 && values[1..] == expected, "{dtype}: {values:?}");
        }
        assert_eq!(append(&mut Vec::new(), &mut exact, Dtype::I64, &[0; 8]), None);
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
}
