//! Plans: the solved weights of a target and their error.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::no_prediction::NoPrediction;
use super::noise::{HeldBack, MovementEvent, Noise, PredictedError, WorstGroup};
use super::shortfall::Shortfall;
use super::source::IndexedSource;
use super::stored_noise::{ErrorSource, PredictedSolution, RelativeErrorModel};
use crate::error::{Error, Result};
use crate::fs::start_threads;
use crate::math::{ChainSource, History, Profile, System};

/// The time of a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum At {
    /// The time of the newest snapshot.
    #[default]
    Latest,
    /// A step, or time on the run's own clock, at or between snapshots.
    Step(u64),
}

/// The solved weights of a target.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The target profile.
    pub profile: Profile,
    /// The time of the target.
    pub at: u64,
    /// `||sum_i x_i p_i - r|| / ||r||`: the relative distance of the blend's profile from the target's.
    pub relative_error: f64,
    /// `sqrt(sum_i x_i^2)`: the amplification of independent rounding errors of the snapshots.
    pub noise_gain: f64,
    /// The condition number of the scaled system.
    pub condition: f64,
    /// The sum of the weights: 1 up to rounding.
    pub sum: f64,
    /// The regularisation `rho` of the solve, in the units of the profiles' norm (1/sqrt steps); 0 for none.
    pub rho: f64,
    /// The expected error of the average, before its rounding to the output's dtype.
    ///
    /// `None` for a reason that `no_prediction` has.
    pub predicted: Option<PredictedError>,
    /// The reason for having no predicted error, with a remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_prediction: Option<NoPrediction>,
    /// The event between two snapshots that makes the most of the predicted error, and its range; `None` if none does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event: Option<MovementEvent>,
    /// The group of tensors with the largest predicted error; `None` if all move alike or nothing is predicted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worst_group: Option<WorstGroup>,
    /// The better regularisation that [`Noise::Auto`] left out, and the tensors that it would make worse.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_back: Option<HeldBack>,
    /// The reason of a relative error above 5%, with a remedy; `warning` when it is serialized.
    #[serde(rename = "warning")]
    pub shortfall: Option<Shortfall>,
    /// The weights, in order of profile and step.
    pub weights: Vec<Weight>,
    /// The weights of tensors whose averages began after the run did, and those of groups with targets of their own.
    /// These tensors do not have the plan's own weights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub later: Vec<LaterTensors>,
    /// The targets of groups of tensors, by name; their weights are in `later`. Empty if all tensors have one target.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub groups: BTreeMap<String, Profile>,
}

impl Plan {
    /// Iterates over the weights of all tensors.
    pub(crate) fn all_weights(&self) -> impl Iterator<Item = &Weight> {
        self.weights.iter().chain(self.later.iter().flat_map(|later| &later.weights))
    }
}

/// The weight of one snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Weight {
    /// The index of the profile within the run.
    pub index: usize,
    /// The step of the snapshot.
    pub step: u64,
    /// The weight of the snapshot.
    pub weight: f64,
}

/// The solved weights of tensors whose averages began after the run did, or of a group with a target of its own.
///
/// Their averages hold their first values from before `since` on, as a training that began there does.
#[derive(Clone, Debug, Serialize)]
pub struct LaterTensors {
    /// The step at which their averages began; 0 if it is that of the run.
    pub since: u64,
    /// The names of the tensors.
    pub tensors: Vec<String>,
    /// As [`Plan::relative_error`], over the updates since they began.
    pub relative_error: f64,
    /// As [`Plan::noise_gain`].
    pub noise_gain: f64,
    /// The weights of the snapshots that have the tensors, in order of profile and step.
    pub weights: Vec<Weight>,
}

/// Solves several targets at one time over the same sources, with one factorization.
///
/// `movement` has the movement and rounding of the sources, in their order.
pub(crate) fn solve(
    sources: &[IndexedSource],
    history: Option<&History>,
    profiles: &[Profile],
    at: At,
    noise: Noise,
    movement: Result<&dyn ErrorSource, NoPrediction>,
) -> Result<Vec<Plan>> {
    start_threads()?;
    let rho = noise.rho()?;
    let at = target_time(sources, at)?;
    let usable: Vec<usize> = (0..sources.len()).filter(|&i| sources[i].step <= at).collect();
    let inputs: Vec<ChainSource> = usable.iter().map(|&i| sources[i].to_chain_source()).collect();
    let system = match history {
        Some(history) => System::new(history, at, &inputs, rho)?,
        None => System::closed_form(at, &inputs, rho)?,
    };
    let model = movement.and_then(|movement| movement.model(&system, sources, &usable));
    let solver = Solver { system: &system, sources, model, noise, rho };
    let usable: Vec<&IndexedSource> = usable.iter().map(|&i| &sources[i]).collect();
    // Collect all results first, so that the error returned is that of the first target, not of the first thread.
    let plans: Vec<Result<Plan>> = profiles.par_iter().map(|profile| solver.plan(&usable, profile, at)).collect();
    plans.into_iter().collect()
}

/// Returns the time of a target, checked against the sources' steps.
fn target_time(sources: &[IndexedSource], at: At) -> Result<u64> {
    let steps = sources.iter().map(|source| source.step);
    let (Some(first), Some(last)) = (steps.clone().min(), steps.max()) else {
        return Err(Error::NoSource {
            wanted: "snapshot to blend".into(),
            remedy: "train until the first one is stored",
        });
    };
    match at {
        At::Latest => Ok(last),
        At::Step(at) if at > last => Err(Error::TargetAfter { at, last }),
        At::Step(at) if at < first => Err(Error::TargetBefore { at, first }),
        At::Step(at) => Ok(at),
    }
}

/// Solver of the targets of one time.
struct Solver<'a> {
    system: &'a System,
    /// All sources, also those after the time.
    sources: &'a [IndexedSource],
    model: Result<RelativeErrorModel<'a>, NoPrediction>,
    noise: Noise,
    rho: f64,
}

impl Solver<'_> {
    fn solve(&self, profile: &Profile) -> Result<PredictedSolution> {
        let model = match &self.model {
            Ok(model) => model,
            Err(why) => {
                let solution = self.system.solve(profile)?;
                let (rho, predicted) = (self.rho, Err(*why));
                return Ok(PredictedSolution {
                    solution,
                    rho,
                    predicted,
                    worst_group: None,
                    event: None,
                    held_back: None,
                });
            }
        };
        match self.noise {
            Noise::Auto => model.solve_best(profile),
            Noise::Off | Noise::Rho(_) => model.solve(profile, self.rho),
        }
    }

    fn plan(&self, usable: &[&IndexedSource], profile: &Profile, at: u64) -> Result<Plan> {
        let PredictedSolution { solution, rho, predicted, worst_group, event, held_back } = self.solve(profile)?;
        let weights: Vec<Weight> = usable
            .iter()
            .zip(&solution.weights)
            .map(|(source, &weight)| Weight { index: source.index, step: source.step, weight })
            .collect();
        let shortfall = Shortfall::of(self.sources, profile, at, solution.relative_error);
        Ok(Plan {
            profile: profile.clone(),
            at,
            relative_error: solution.relative_error,
            noise_gain: solution.noise_gain,
            condition: solution.condition,
            sum: solution.weights.iter().sum(),
            rho,
            predicted: predicted.ok(),
            no_prediction: predicted.err(),
            event,
            worst_group,
            held_back,
            shortfall,
            weights,
            later: Vec::new(),
            groups: BTreeMap::new(),
        })
    }
}
