//! Evaluated averages and their order.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::math::{Family, Profile};
use crate::planning::Plan;

/// Direction in which scores are better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// Small scores are better: a loss, an FID.
    #[default]
    Minimize,
    /// Large scores are better: an accuracy.
    Maximize,
}

/// Outcome of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrialOutcome {
    /// Finite score.
    Score(f64),
    /// Reason of the failure.
    Error(String),
}

/// Facts about an average beside its score. All of them are optional.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrialMetrics {
    /// Relative distance of the synthesized profile from the target ([`Plan::relative_error`]).
    pub relative_error: Option<f64>,
    /// Factor by which rounding errors of the snapshots are amplified ([`Plan::noise_gain`]).
    pub noise_gain: Option<f64>,
    /// Duration of the evaluation in seconds.
    pub seconds: Option<f64>,
}

/// One average and its evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Target profile.
    pub profile: Profile,
    /// Score or failure.
    #[serde(flatten)]
    pub outcome: TrialOutcome,
    /// Facts about the average.
    #[serde(flatten)]
    pub metrics: TrialMetrics,
    /// True if the refinement chose the profile, false if it is in the list of targets.
    pub refined: bool,
}

impl Trial {
    /// Returns the score, unless the evaluation failed.
    pub fn score(&self) -> Option<f64> {
        match self.outcome {
            TrialOutcome::Score(score) => Some(score),
            TrialOutcome::Error(_) => None,
        }
    }
}

impl TrialMetrics {
    /// Metrics of a plan whose evaluation took `seconds`.
    pub fn of(plan: &Plan, seconds: f64) -> TrialMetrics {
        TrialMetrics {
            relative_error: Some(plan.relative_error),
            noise_gain: Some(plan.noise_gain),
            seconds: Some(seconds),
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Goal::Minimize => "minimize",
            Goal::Maximize => "maximize",
        })
    }
}

/// Trials of a sweep in the order of their evaluation, at most one per profile.
#[derive(Clone, Debug)]
pub(super) struct Trials {
    goal: Goal,
    trials: Vec<Trial>,
}

impl Trials {
    pub(super) fn new(goal: Goal) -> Trials {
        Trials { goal, trials: Vec::new() }
    }

    pub(super) fn goal(&self) -> Goal {
        self.goal
    }

    pub(super) fn as_slice(&self) -> &[Trial] {
        &self.trials
    }

    pub(super) fn extend(&mut self, trials: impl Iterator<Item = Trial>) {
        self.trials.extend(trials);
    }

    /// Appends a trial, which replaces an earlier one of the same profile.
    pub(super) fn record(&mut self, trial: Trial) -> &Trial {
        self.trials.retain(|earlier| earlier.profile != trial.profile);
        self.trials.push(trial);
        &self.trials[self.trials.len() - 1]
    }

    /// Returns the trial of a profile.
    pub(super) fn get(&self, profile: &Profile) -> Option<&Trial> {
        self.trials.iter().find(|trial| trial.profile == *profile)
    }

    /// Returns the trial of the best score, the first of equal ones. Returns `None` if no evaluation succeeded.
    pub(super) fn best(&self) -> Option<&Trial> {
        let scored = self.trials.iter().filter(|trial| trial.score().is_some());
        scored.reduce(|best, trial| if self.is_better(trial, best) { trial } else { best })
    }

    /// Iterates over the trials of a family, each with its length.
    pub(super) fn of_family(&self, family: Family) -> impl Iterator<Item = (&Trial, f64)> {
        self.trials.iter().filter_map(move |trial| match trial.profile.family() {
            Some((other, length)) if other == family => Some((trial, length)),
            _ => None,
        })
    }

    /// Returns true if a trial is strictly better than another. Every score is better than a failure.
    pub(super) fn is_better(&self, trial: &Trial, other: &Trial) -> bool {
        match (trial.score(), other.score(), self.goal) {
            (Some(score), Some(other), Goal::Minimize) => score < other,
            (Some(score), Some(other), Goal::Maximize) => score > other,
            (score, other, _) => score.is_some() && other.is_none(),
        }
    }
}
