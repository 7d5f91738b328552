//! The rounding of stored snapshots beside the parameters' movement, from a sample of the elements.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;

use super::source::IndexedSource;
use crate::compute::cpu::to_f32;
use crate::error::{Error, Result};
use crate::math::noise::{Choice, Measured, Model, Sample, measure};
use crate::math::{Profile, Solution, System};
use crate::snapshot::Snapshot;
use crate::tensor::{TensorSpec, is_averaged};

/// What a solve does against the rounding of stored snapshots, which a blend amplifies by its noise gain.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Noise {
    /// Nothing: the blend's profile comes as near to the target as it can.
    #[default]
    Off,
    /// For each target the regularisation of which the smallest error is predicted; none unless it takes two fifths
    /// off. Off where there is too little to predict from ([`Plan::predicted`](super::Plan::predicted)).
    Auto,
    /// This regularisation `rho`, in the units of the profiles' norm (1/sqrt steps): `rho^2 ||x||^2` is added to the squared
    /// distance of the profiles.
    Rho(f64),
}

impl Noise {
    /// The regularisation that is the same for all targets.
    pub(crate) fn rho(self) -> Result<f64> {
        match self {
            Noise::Off | Noise::Auto => Ok(0.0),
            Noise::Rho(rho) if rho >= 0.0 && (rho * rho).is_finite() => Ok(rho),
            Noise::Rho(value) => {
                let allowed = "a regularisation is 0 or more and finite; 0 is none".into();
                Err(Error::Parameter { name: "rho", value, allowed })
            }
        }
    }
}

/// As [`FromStr`] reads it.
impl fmt::Display for Noise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Noise::Off => f.write_str("off"),
            Noise::Auto => f.write_str("auto"),
            Noise::Rho(rho) => write!(f, "{rho}"),
        }
    }
}

impl FromStr for Noise {
    type Err = String;

    fn from_str(text: &str) -> Result<Noise, String> {
        match text {
            "off" => Ok(Noise::Off),
            "auto" => Ok(Noise::Auto),
            _ => {
                let noise =
                    text.parse().map(Noise::Rho).map_err(|_| format!("`{text}` is not off, auto or a number"))?;
                noise.rho().map(|_| noise).map_err(|error| error.to_string())
            }
        }
    }
}

/// The error that is to be expected of an average: root mean squares over its elements, relative to that of the
/// newest snapshot's weights at the time of the target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PredictedError {
    /// Because the blend's profile is not the target's.
    pub profile: f64,
    /// Because snapshots are stored rounded.
    pub rounding: f64,
    /// Both together.
    pub total: f64,
}

/// The fewest steps of snapshots to tell drift, walk and noise from each other.
const FEWEST_STEPS: usize = 3;

/// The most elements of a sample, and the fewest.
const ELEMENTS: (usize, usize) = (256, 4_096);

/// Pairs of snapshots times elements that a sample may have: a tenth of a second of work.
const WORK: usize = 1 << 27;

/// Where in the model a sample is taken: so many stretches.
const BLOCKS: usize = 16;

/// What a sample of a run's snapshots tells.
#[derive(Debug)]
pub(crate) struct SnapshotNoise {
    measured: Measured,
    /// The root mean square of each snapshot's weights.
    sizes: Vec<f64>,
}

impl SnapshotNoise {
    /// Samples snapshots; none where they are of too few steps, or nothing is averaged.
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

    /// The model of a system of some of the snapshots.
    pub(crate) fn model<'a>(
        &self,
        system: &'a System,
        sources: &[IndexedSource],
        usable: &[usize],
    ) -> Option<ScaledModel<'a>> {
        let mut steps: Vec<u64> = usable.iter().map(|&i| sources[i].step).collect();
        steps.sort_unstable();
        steps.dedup();
        let newest = usable.iter().filter(|&&i| Some(&sources[i].step) == steps.last());
        let size = newest.map(|&i| self.sizes[i]).fold(0.0, f64::max);
        let enough = steps.len() >= FEWEST_STEPS && size > 0.0;
        let model = enough.then(|| Model::new(system, self.measured.only(usable)))??;
        Some(ScaledModel { model, size })
    }
}

/// A model of errors, relative to the size of the weights.
pub(crate) struct ScaledModel<'a> {
    model: Model<'a>,
    /// The root mean square of the newest snapshot's weights, the largest where there are several.
    size: f64,
}

impl ScaledModel<'_> {
    /// The weights by the system's own regularisation.
    pub(crate) fn given(&self, profile: &Profile, rho: f64) -> Result<(Solution, f64, Option<PredictedError>)> {
        self.model.given(profile, rho).map(|choice| self.scaled(choice))
    }

    /// The weights by the regularisation of which the smallest error is predicted.
    pub(crate) fn best(&self, profile: &Profile) -> Result<(Solution, f64, Option<PredictedError>)> {
        self.model.best(profile).map(|choice| self.scaled(choice))
    }

    fn scaled(&self, Choice { solution, rho, expected }: Choice) -> (Solution, f64, Option<PredictedError>) {
        let [profile, rounding, total] =
            [expected.profile, expected.rounding, expected.total()].map(|error| error / self.size);
        (solution, rho, Some(PredictedError { profile, rounding, total }))
    }
}

/// The same elements of all snapshots: stretches spread evenly over all averaged tensors.
fn sample(snapshots: &[Snapshot], averaged: &[TensorSpec]) -> Option<Sample> {
    let counts: Vec<usize> = averaged.iter().map(|tensor| tensor.shape.iter().product()).collect();
    let pairs = snapshots.len() * snapshots.len();
    let stretches = stretches(&counts, (WORK / pairs).clamp(ELEMENTS.0, ELEMENTS.1));
    let read = |snapshot: &Snapshot| snapshot.sparsely(|| read(snapshot, averaged, &stretches));
    let read: Vec<(Vec<f64>, Vec<f64>)> = snapshots.par_iter().map(read).collect::<Option<_>>()?;
    let (values, ulps): (Vec<_>, Vec<_>) = read.into_iter().unzip();
    let mut start = 0;
    let mut block = |(_, stretch): &(usize, Range<usize>)| {
        start += stretch.len();
        start - stretch.len()..start
    };
    let blocks: Vec<Range<usize>> = stretches.iter().map(&mut block).collect();
    let finite = values.iter().flatten().all(|value| value.is_finite());
    (finite && !values.first()?.is_empty()).then_some(Sample { values, ulps, blocks })
}

/// Tensor and elements of each stretch: `BLOCKS` of them, cut where tensors end, about `elements` in all.
fn stretches(counts: &[usize], elements: usize) -> Vec<(usize, Range<usize>)> {
    let total: usize = counts.iter().sum();
    let length = total.div_ceil(BLOCKS).min(elements / BLOCKS);
    // The remainder is spread, too: the first stretch begins at the first element and the last one ends at the last.
    let starts = (0..BLOCKS).map(|k| ((total - length) as u128 * k as u128 / (BLOCKS - 1) as u128) as usize);
    let mut cut = Vec::new();
    for wanted in starts.map(|start| start..start + length) {
        let mut begin = 0;
        for (tensor, &count) in counts.iter().enumerate() {
            let within = wanted.start.clamp(begin, begin + count)..wanted.end.clamp(begin, begin + count);
            cut.extend((!within.is_empty()).then(|| (tensor, within.start - begin..within.end - begin)));
            begin += count;
        }
    }
    cut
}

/// Values and `ulp`s of the stretches in one snapshot.
fn read(
    snapshot: &Snapshot,
    tensors: &[TensorSpec],
    stretches: &[(usize, Range<usize>)],
) -> Option<(Vec<f64>, Vec<f64>)> {
    let count = stretches.iter().map(|(_, range)| range.len()).sum();
    let (mut values, mut ulps) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for (tensor, range) in stretches {
        let (stored, bytes) = snapshot.tensor(&tensors[*tensor].name)?;
        let (dtype, size) = (stored.dtype, stored.dtype.bitsize() / 8);
        let start = values.len();
        append(&mut values, dtype, bytes.get(range.start * size..range.end * size)?)?;
        ulps.extend(values[start..].iter().map(|&value| ulp(dtype, value)));
    }
    Some((values, ulps))
}

/// Appends floating-point elements as stored, which f64 holds exactly; none for other dtypes.
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

/// The distance of neighbouring values of `dtype` about `value`.
fn ulp(dtype: Dtype, value: f64) -> f64 {
    // Bits after the point, and the smallest exponent of all.
    let (digits, least) = match dtype {
        Dtype::F16 => (10, -24),
        Dtype::BF16 => (7, -133),
        Dtype::F32 => (23, -149),
        _ => (52, -1074),
    };
    let exponent = (value.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    power_of_two((exponent - digits).max(least))
}

/// `2^exponent`, for exponents from -1074 on.
fn power_of_two(exponent: i32) -> f64 {
    // A normal number's exponent, or the one bit of a number below.
    let bits = if exponent > -1023 { ((exponent + 1023) as u64) << 52 } else { 1 << (exponent + 1074) };
    f64::from_bits(bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn elements_are_read_as_they_are_stored() {
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
        let (mut down, mut up) = (1.0, 1.0);
        for exponent in 0..=1074 {
            assert_eq!(power_of_two(-exponent), down, "{exponent}");
            down *= 0.5;
        }
        for exponent in 0..1024 {
            assert_eq!(power_of_two(exponent), up, "{exponent}");
            up *= 2.0;
        }
    }

    /// Against the dtypes' own next values.
    #[test]
    fn an_ulp_is_the_distance_to_the_next_value() {
        for bits in (0..0x7bff_u16).step_by(7) {
            let (value, next) = (f16::from_bits(bits).to_f64(), f16::from_bits(bits + 1).to_f64());
            assert_eq!(ulp(Dtype::F16, -value), next - value, "{value}");
        }
        for bits in (0..0x7f7f_u16).step_by(7) {
            let (value, next) = (bf16::from_bits(bits).to_f64(), bf16::from_bits(bits + 1).to_f64());
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
    fn stretches_lie_all_over_the_model_and_within_its_tensors() {
        for counts in [vec![1], vec![3, 0, 5], vec![100_000], vec![7; 5000], vec![1 << 40, 10]] {
            let total: usize = counts.iter().sum();
            let cut = stretches(&counts, ELEMENTS.1);
            assert!(cut.iter().all(|(tensor, range)| range.end <= counts[*tensor] && !range.is_empty()), "{counts:?}");
            let length: usize = cut.iter().map(|(_, range)| range.len()).sum();
            assert!(length <= ELEMENTS.1.max(2 * BLOCKS) && length >= total.min(ELEMENTS.1), "{length} of {total}");
        }
        let ends = stretches(&[1 << 40], ELEMENTS.1);
        assert!(ends[0].1.start == 0 && ends[15].1.end > (1 << 40) - 16 && ends.len() == BLOCKS);
        assert!(stretches(&[], ELEMENTS.1).is_empty());
    }

    #[test]
    fn a_regularisation_is_a_number_from_zero_on() {
        for rho in [-1e-9, f64::NAN, f64::INFINITY, 1e300] {
            let text = Noise::Rho(rho).rho().unwrap_err().to_string();
            assert!(text.contains("rho") && text.contains("0 or more"), "{text}");
        }
        assert_eq!(Noise::Rho(0.5).rho().unwrap(), 0.5);
        assert_eq!("0.5".parse(), Ok(Noise::Rho(0.5)));
        assert_eq!(("off".parse(), "auto".parse()), (Ok(Noise::Off), Ok(Noise::Auto)));
        for text in ["", "on", "-1", "NaN", "inf"] {
            assert!(text.parse::<Noise>().is_err(), "{text}");
        }
        assert_eq!(Noise::Auto.rho().unwrap(), 0.0);
    }
}
