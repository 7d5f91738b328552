//! Plans: the solved weights of a target, with their error.

use rayon::prelude::*;
use serde::Serialize;

use super::pool::Source;
use crate::error::{Error, Result};
use crate::math::{self, History, Profile, System};

/// The time of a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum At {
    /// The newest snapshot.
    #[default]
    Latest,
    /// This step (or this time on the run's own clock), at or between snapshots.
    Step(u64),
}

/// The solved weights of a target.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The profile that was asked for.
    pub profile: Profile,
    /// Its time.
    pub at: u64,
    /// `||sum_i x_i p_i - r|| / ||r||`: how far the blend's profile is from the target's.
    pub relative_error: f64,
    /// `sqrt(sum_i x_i^2)`: by how much independent rounding errors of the snapshots are amplified.
    pub noise_gain: f64,
    /// The condition number of the scaled system.
    pub condition: f64,
    /// The sum of the weights: 1 but for rounding.
    pub sum: f64,
    /// The weights, in order of profile and step.
    pub weights: Vec<Weight>,
}

/// The weight of one snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Weight {
    /// The index of the profile within the run.
    pub index: usize,
    /// The step.
    pub step: u64,
    /// Its weight.
    pub weight: f64,
}

/// Solves several targets at one time over the same sources; the system is factored once.
pub(crate) fn solve(
    sources: &[Source],
    history: Option<&History>,
    profiles: &[Profile],
    at: At,
    rho: f64,
) -> Result<Vec<Plan>> {
    let steps = sources.iter().map(|source| source.step);
    let (Some(first), Some(last)) = (steps.clone().min(), steps.max()) else {
        return Err(Error::Nothing("there is no snapshot to blend".into()));
    };
    let at = match at {
        At::Latest => last,
        At::Step(at) if at > last => return Err(Error::TargetAfter { at, last }),
        At::Step(at) if at < first => return Err(Error::TargetBefore { at, first }),
        At::Step(at) => at,
    };
    let usable: Vec<&Source> = sources.iter().filter(|source| source.step <= at).collect();
    let inputs: Vec<math::Source> = usable.iter().map(|source| source.for_solve()).collect();
    let system = match history {
        Some(history) => System::new(history, at, &inputs, rho)?,
        None => System::closed_form(at, &inputs, rho)?,
    };
    // All of them first: of several errors the first target's is told, whichever thread is done first.
    let plans: Vec<Result<Plan>> = profiles.par_iter().map(|profile| plan(&system, &usable, profile, at)).collect();
    plans.into_iter().collect()
}

fn plan(system: &System, usable: &[&Source], profile: &Profile, at: u64) -> Result<Plan> {
    let solution = system.solve(profile)?;
    let weights: Vec<Weight> = usable
        .iter()
        .zip(&solution.weights)
        .map(|(source, &weight)| Weight { index: source.index, step: source.step, weight })
        .collect();
    Ok(Plan {
        profile: profile.clone(),
        at,
        relative_error: solution.relative_error,
        noise_gain: solution.noise_gain,
        condition: solution.condition,
        sum: solution.weights.iter().sum(),
        weights,
    })
}
