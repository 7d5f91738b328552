//! Movement and rounding of a run's averages, and the errors predicted from them.

use std::collections::{BTreeMap, BTreeSet};

use super::movement_groups::{TensorMovement, movement_groups};
use super::no_prediction::{FEWEST_STEPS, NoPrediction};
use super::noise::{HeldBack, MovementEvent, PredictedError, WorstGroup};
use super::sample::{ModelSample, SampledSource, SampledTensor, sample, ulp};
use super::source::IndexedSource;
use crate::error::Result;
use crate::math::noise::{
    ErrorModel, ExpectedError, ExpectedEvent, LikeGroup, MeasuredGroup, RegularisedSolution, Sample, measure,
};
use crate::math::{Profile, Solution, System};
use crate::tensor::{Dtype, TensorSpec};

/// Ratio of the largest to the smallest error from which an event is worth a word.
const WIDE: f64 = 1.5;

/// Movement and rounding from which errors are predicted.
pub(crate) trait ErrorSource: Sync {
    /// Returns the error model of a system of the sources `usable`.
    ///
    /// # Errors
    /// [`NoPrediction`] if there is too little to predict from.
    fn model<'a>(
        &'a self,
        system: &'a System,
        sources: &[IndexedSource],
        usable: &[usize],
    ) -> Result<RelativeErrorModel<'a>, NoPrediction>;
}

/// Movement and rounding of a run's averages, measured on a sample.
#[derive(Debug)]
pub(crate) struct SnapshotNoise {
    groups: Vec<StoredGroup>,
}

/// Movement and rounding of tensors that move alike.
#[derive(Debug)]
struct StoredGroup {
    /// Names of the tensors.
    tensors: Vec<String>,
    measured: MeasuredGroup,
    /// The mean square of each snapshot's weights.
    sizes: Vec<f64>,
    /// Binary exponents of the newest snapshot's weights, each with its share of the group.
    exponents: Vec<(i32, f64)>,
    /// True if every element was sampled.
    complete: bool,
}

impl SnapshotNoise {
    /// Samples the averages of each step.
    ///
    /// # Errors
    /// [`NoPrediction`] if they are of too few steps, or nothing is averaged.
    pub(crate) fn of(
        steps: &[u64],
        sources: &[&dyn SampledSource],
        averaged: &[TensorSpec],
    ) -> Result<SnapshotNoise, NoPrediction> {
        let last = last_of(steps)?;
        let newest = steps.iter().position(|&step| step == last).unwrap_or_default();
        let sample = sample(sources, averaged).ok_or(NoPrediction::NoSample)?;
        Ok(SnapshotNoise { groups: stored_groups(&sample, averaged, newest) })
    }
}

/// Returns the last of some steps.
///
/// # Errors
/// [`NoPrediction::FewSteps`].
fn last_of(steps: &[u64]) -> Result<u64, NoPrediction> {
    let distinct: BTreeSet<u64> = steps.iter().copied().collect();
    let last = distinct.last().copied().filter(|_| distinct.len() >= FEWEST_STEPS);
    last.ok_or(NoPrediction::FewSteps { steps: distinct.len() })
}

/// A sample that does not move says nothing of elements that are not in it.
impl ErrorSource for SnapshotNoise {
    fn model<'a>(
        &'a self,
        system: &'a System,
        sources: &[IndexedSource],
        usable: &[usize],
    ) -> Result<RelativeErrorModel<'a>, NoPrediction> {
        let (groups, size) = self.relative_groups(sources, usable)?;
        let subset = |StoredGroup { measured: MeasuredGroup { measured, share }, .. }: &StoredGroup| MeasuredGroup {
            measured: measured.subset(usable),
            share: *share,
        };
        let measured = self.groups.iter().map(subset).collect();
        let model = ErrorModel::new(system, measured).ok_or(NoPrediction::NoHistory)?;
        Ok(RelativeErrorModel { model, groups, size })
    }
}

impl SnapshotNoise {
    /// Returns the groups with their sizes, and the root mean square of all weights, at the newest of some sources.
    ///
    /// # Errors
    /// [`NoPrediction`] if the sources are of too few steps, or do not move.
    pub(super) fn relative_groups(
        &self,
        sources: &[IndexedSource],
        usable: &[usize],
    ) -> Result<(Vec<RelativeGroup<'_>>, f64), NoPrediction> {
        let last = last_of(&usable.iter().map(|&i| sources[i].step).collect::<Vec<u64>>())?;
        let newest: Vec<usize> = usable.iter().copied().filter(|&i| sources[i].step == last).collect();
        let of_group = |group| relative_group(group, usable, &newest);
        let groups: Vec<RelativeGroup<'_>> = self.groups.iter().map(of_group).collect();
        let mean_square: f64 = groups.iter().map(|group| group.share * group.size.powi(2)).sum();
        if !(mean_square > 0.0) {
            return Err(NoPrediction::Zeros);
        }
        if !groups.iter().any(|group| group.is_seen) {
            return Err(NoPrediction::Still);
        }
        Ok((groups, mean_square.sqrt()))
    }

    /// Returns the measurements of each group, for a training that is expected to be like this one.
    ///
    /// `dtype` is that of the other training's snapshots.
    pub(super) fn like_groups(&self, dtype: Dtype) -> Vec<LikeGroup> {
        let of_group = |StoredGroup { measured, exponents, .. }: &StoredGroup| LikeGroup {
            group: measured.clone(),
            ulps: exponents.iter().map(|&(exponent, share)| (ulp(dtype, 2f64.powi(exponent)), share)).collect(),
        };
        self.groups.iter().map(of_group).collect()
    }
}

/// Returns a group with the size of its weights in the sources `newest`.
fn relative_group<'a>(group: &'a StoredGroup, usable: &[usize], newest: &[usize]) -> RelativeGroup<'a> {
    RelativeGroup {
        tensors: &group.tensors,
        share: group.measured.share,
        size: newest.iter().map(|&i| group.sizes[i]).fold(0.0, f64::max).sqrt(),
        is_seen: group.complete || usable.iter().any(|&i| group.measured.measured.moved[(usable[0], i)] > 0.0),
    }
}

/// Measures each group of tensors.
fn stored_groups(sampled: &ModelSample, averaged: &[TensorSpec], newest: usize) -> Vec<StoredGroup> {
    let ModelSample { sample, tensors } = sampled;
    let movements: Vec<TensorMovement> = tensors.iter().map(|tensor| movement(sample, tensor, newest)).collect();
    let total: f64 = sample.weights.iter().sum();
    let groups = movement_groups(&movements).into_iter().map(|group| {
        let members = || group.tensors.iter().map(|&index| &tensors[index]);
        let weight: f64 = members().map(|tensor| tensor.count as f64).sum();
        let size = |values: &Vec<f64>| {
            let square = |i: usize| sample.weights[i] * values[i].powi(2);
            members().flat_map(|tensor| tensor.elements.clone()).map(square).sum::<f64>() / weight
        };
        StoredGroup {
            tensors: members().map(|tensor| averaged[tensor.index].name.clone()).collect(),
            measured: MeasuredGroup { measured: measure(sample, &group.blocks), share: weight / total },
            sizes: sample.values.iter().map(size).collect(),
            exponents: exponents(sample, newest, members().flat_map(|tensor| tensor.elements.clone())),
            complete: members().all(|tensor| tensor.count == tensor.elements.len()),
        }
    });
    groups.collect()
}

/// Returns the binary exponents of elements in one average, each with its share of them.
fn exponents(sample: &Sample, source: usize, elements: impl Iterator<Item = usize>) -> Vec<(i32, f64)> {
    let mut weights: BTreeMap<i32, f64> = BTreeMap::new();
    for i in elements {
        let exponent = (sample.values[source][i].to_bits() >> 52 & 0x7ff) as i32 - 1023;
        *weights.entry(exponent).or_default() += sample.weights[i];
    }
    let total: f64 = weights.values().sum();
    weights.into_iter().map(|(exponent, weight)| (exponent, weight / total)).collect()
}

/// Returns the movement of one tensor: mean square differences to the snapshot `newest`.
fn movement(sample: &Sample, tensor: &SampledTensor, newest: usize) -> TensorMovement {
    let elements = tensor.elements.clone();
    let last = &sample.values[newest][elements.clone()];
    let count = elements.len() as f64;
    let distance = |values: &Vec<f64>| {
        values[elements.clone()].iter().zip(last).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / count
    };
    let moved = sample.values.iter().map(distance).sum::<f64>() / sample.values.len() as f64;
    TensorMovement { elements: elements.clone(), moved, size: last.iter().map(|v| v * v).sum::<f64>() / count }
}

/// A model of errors relative to the size of the weights.
pub(crate) struct RelativeErrorModel<'a> {
    pub model: ErrorModel<'a>,
    pub groups: Vec<RelativeGroup<'a>>,
    /// The root mean square of the newest snapshot's weights; the largest of several snapshots.
    pub size: f64,
}

/// A group of tensors with the size of its weights.
pub(crate) struct RelativeGroup<'a> {
    pub tensors: &'a [String],
    pub share: f64,
    /// As [`RelativeErrorModel::size`], of the group's weights.
    pub size: f64,
    /// True unless elements that were not sampled may move although the sampled ones do not.
    pub is_seen: bool,
}

/// A solution with its predicted errors.
pub(crate) struct PredictedSolution {
    pub solution: Solution,
    pub rho: f64,
    pub predicted: Result<PredictedError, NoPrediction>,
    pub worst_group: Option<WorstGroup>,
    pub event: Option<MovementEvent>,
    pub held_back: Option<HeldBack>,
}

impl RelativeErrorModel<'_> {
    /// Solves with the system's own regularisation, `rho`.
    pub(crate) fn solve(&self, profile: &Profile, rho: f64) -> Result<PredictedSolution> {
        self.model.solve(profile, rho).map(|solved| self.relative(solved))
    }

    /// Solves with the regularisation of the smallest predicted error.
    pub(crate) fn solve_best(&self, profile: &Profile) -> Result<PredictedSolution> {
        self.model.solve_best(profile).map(|solved| self.relative(solved))
    }

    fn relative(&self, solved: RegularisedSolution) -> PredictedSolution {
        let event = self.event(&solved);
        let RegularisedSolution { solution, rho, expected, groups, refused, .. } = solved;
        let predicted = Ok(predicted_error(expected, self.size));
        let held_back = refused.map(|refused| HeldBack {
            tensors: self.groups[refused.group].tensors.to_vec(),
            rho: refused.rho,
            predicted: predicted_error(refused.expected, self.size),
        });
        PredictedSolution { solution, rho, predicted, worst_group: self.worst_group(&groups), event, held_back }
    }

    /// Returns the event that makes the most of an error, if there is one.
    fn event(&self, solved: &RegularisedSolution) -> Option<MovementEvent> {
        let ExpectedEvent { between: (after, before), profile: (least, most) } = self.model.expected_event(solved)?;
        let total = |profile: f64| profile.hypot(solved.expected.rounding) / self.size;
        let event = MovementEvent { after, before, least: total(least), most: total(most) };
        Some(event).filter(|event| event.most > WIDE * event.least)
    }

    /// Returns the group of the largest error relative to its own weights; `None` if there is only one.
    fn worst_group(&self, errors: &[ExpectedError]) -> Option<WorstGroup> {
        let seen = self.groups.iter().zip(errors).filter(|(group, _)| group.is_seen && group.size > 0.0);
        let relative = seen.map(|(group, error)| (group, predicted_error(*error, group.size)));
        let (group, predicted) = relative.max_by(|a, b| a.1.total.total_cmp(&b.1.total))?;
        let tensors = group.tensors.to_vec();
        (self.groups.len() > 1).then_some(WorstGroup { tensors, share: group.share, predicted })
    }
}

/// Returns an expected error relative to the size of the weights.
fn predicted_error(expected: ExpectedError, size: f64) -> PredictedError {
    PredictedError {
        profile: expected.profile / size,
        rounding: expected.rounding / size,
        total: expected.total() / size,
    }
}
