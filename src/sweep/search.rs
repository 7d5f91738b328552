//! The search: what to evaluate next, and what was best.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::refine;
use crate::error::{Error, Result};
use crate::math::{Family, MAX_SIGMA_REL, Profile, Unit};
use crate::planning::Plan;

/// Which scores are better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// Small ones: a loss, an FID.
    #[default]
    Minimize,
    /// Large ones: an accuracy.
    Maximize,
}

/// What came of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// A finite number.
    Score(f64),
    /// Why there is none.
    Error(String),
}

/// What is known of an average beside its score; all of it may be left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrialMetrics {
    /// How far the synthesized profile is from the one asked for ([`Plan::relative_error`]).
    pub relative_error: Option<f64>,
    /// By how much rounding errors of the snapshots were amplified ([`Plan::noise_gain`]).
    pub noise_gain: Option<f64>,
    /// How long the evaluation took.
    pub seconds: Option<f64>,
}

/// One average and its evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// What was asked for.
    pub profile: Profile,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What is known of the average.
    #[serde(flatten)]
    pub figures: TrialMetrics,
    /// Whether the refinement chose it; otherwise it stood in the list.
    pub refined: bool,
}

/// At which end of all that was evaluated the best lies: beyond it there may be better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Edge {
    /// Nothing shorter was evaluated.
    Shortest,
    /// Nothing longer was evaluated.
    Longest,
}

/// A search for the best length: first a list of targets, then golden-section steps around the best of them.
///
/// All that it decides follows from the trials alone, so that a search to which the trials of an earlier one are
/// [restored](Sweep::restore) goes on as that one would have.
///
/// ```
/// use posthoc_ema::{Profile, sweep::{TrialMetrics, Goal, Outcome, Sweep}};
///
/// let targets = [0.05, 0.1, 0.15, 0.2].map(|s| Profile::sigma_rel(s).unwrap());
/// let mut sweep = Sweep::new(&targets, Goal::Minimize, 6)?;
/// loop {
///     let profiles = sweep.next(10);
///     if profiles.is_empty() {
///         break;
///     }
///     for profile in profiles {
///         let score = (profile.as_sigma_rel().unwrap() - 0.137).powi(2); // the evaluation
///         sweep.record(profile, Outcome::Score(score), TrialMetrics::default());
///     }
/// }
/// let best = sweep.best().unwrap().profile.as_sigma_rel().unwrap();
/// assert!((best - 0.137).abs() < 0.005);
/// # Ok::<(), posthoc_ema::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sweep {
    targets: Vec<Profile>,
    goal: Goal,
    refine: usize,
    trials: Vec<Trial>,
}

impl Sweep {
    /// A search over a list of targets with at most `refine` steps around the best one. A target that is named twice is
    /// evaluated once.
    ///
    /// # Errors
    /// [`Error::NoTarget`] for an empty list.
    pub fn new(targets: &[Profile], goal: Goal, refine: usize) -> Result<Sweep> {
        if targets.is_empty() {
            return Err(Error::NoTarget);
        }
        let mut distinct: Vec<Profile> = Vec::with_capacity(targets.len());
        for target in targets {
            if !distinct.contains(target) {
                distinct.push(target.clone());
            }
        }
        Ok(Sweep { targets: distinct, goal, refine, trials: Vec::new() })
    }

    /// Takes over the scores of an earlier search: none of them is evaluated again, all take part in the choice. Failed
    /// trials are left out, and so tried again.
    pub fn restore(&mut self, trials: Vec<Trial>) {
        self.trials.extend(trials.into_iter().filter(|trial| trial.score().is_some()));
    }

    /// What to evaluate next: up to `batch` targets of the list, and when all of them are done, one refinement. Nothing when
    /// the search is over.
    ///
    /// Asked again before all are recorded, it names those that are not.
    pub fn next(&self, batch: usize) -> Vec<Profile> {
        let open = self.targets.iter().filter(|target| self.trial(target).is_none());
        let listed: Vec<Profile> = open.take(batch.max(1)).cloned().collect();
        if !listed.is_empty() || self.refined() >= self.refine {
            return listed;
        }
        refine::next(self).into_iter().collect()
    }

    /// Takes what came of an evaluation; a score that is NaN or infinite is a failure.
    pub fn record(&mut self, profile: Profile, outcome: Outcome, figures: TrialMetrics) -> &Trial {
        let outcome = match outcome {
            Outcome::Score(score) if !score.is_finite() => {
                Outcome::Error(format!("the score is {score}: a finite number is needed"))
            }
            other => other,
        };
        self.trials.retain(|trial| trial.profile != profile);
        let refined = !self.targets.contains(&profile);
        self.trials.push(Trial { profile, outcome, figures, refined });
        &self.trials[self.trials.len() - 1]
    }

    /// What the list named, each once.
    pub fn targets(&self) -> &[Profile] {
        &self.targets
    }

    /// Which scores are better.
    pub fn goal(&self) -> Goal {
        self.goal
    }

    /// All that was evaluated, in that order.
    pub fn trials(&self) -> &[Trial] {
        &self.trials
    }

    /// Those without a score.
    pub fn failures(&self) -> impl Iterator<Item = (&Trial, &str)> {
        self.trials.iter().filter_map(|trial| match &trial.outcome {
            Outcome::Error(why) => Some((trial, why.as_str())),
            Outcome::Score(_) => None,
        })
    }

    /// The trial of a profile.
    pub fn trial(&self, profile: &Profile) -> Option<&Trial> {
        self.trials.iter().find(|trial| trial.profile == *profile)
    }

    /// The best score; of equal ones the first. None where no evaluation succeeded.
    pub fn best(&self) -> Option<&Trial> {
        let scored = self.trials.iter().filter(|trial| trial.score().is_some());
        scored.reduce(|best, trial| if self.is_better(trial, best) { trial } else { best })
    }

    /// Whether the best lies at an end of what was evaluated of its family, and which one: a wider list may do better.
    ///
    /// None where it lies within, where it is alone, and at the end of the family itself, beyond which nothing is.
    pub fn edge(&self) -> Option<Edge> {
        let (family, own) = self.best()?.profile.family()?;
        let lengths = || self.of_family(family).filter(|(trial, _)| trial.score().is_some()).map(|(_, length)| length);
        let (shorter, longer) = (lengths().any(|length| length < own), lengths().any(|length| length > own));
        match (shorter, longer) {
            (false, true) => Some(Edge::Shortest),
            (true, false) if own < longest(family) => Some(Edge::Longest),
            _ => None,
        }
    }

    /// How many evaluations there will be, as far as that can be told.
    pub fn planned(&self) -> usize {
        let open = self.targets.iter().filter(|target| self.trial(target).is_none()).count();
        let left = self.refine.saturating_sub(self.refined());
        self.trials.len() + open + if self.targets.len() > 1 { left } else { 0 }
    }

    /// The trials of a family with their lengths.
    pub(super) fn of_family(&self, family: Family) -> impl Iterator<Item = (&Trial, f64)> {
        let own = move |trial: &Trial| trial.profile.family().filter(|(other, _)| *other == family);
        self.trials.iter().filter_map(move |trial| Some((trial, own(trial)?.1)))
    }

    /// Whether a trial is strictly better than another; a failed one is worse than any score.
    pub(super) fn is_better(&self, trial: &Trial, other: &Trial) -> bool {
        match (trial.score(), other.score(), self.goal) {
            (Some(score), Some(other), Goal::Minimize) => score < other,
            (Some(score), Some(other), Goal::Maximize) => score > other,
            (score, other, _) => score.is_some() && other.is_none(),
        }
    }

    /// The steps around the best that were made; those around another, of a shorter list, do not count.
    fn refined(&self) -> usize {
        refine::made(self)
    }
}

/// The length that no profile of a family exceeds, but for rounding.
fn longest(family: Family) -> f64 {
    match family {
        Family::Power => MAX_SIGMA_REL * (1.0 - 1e-12),
        Family::Uniform(Unit::Fraction) | Family::Linear(Unit::Fraction) | Family::LrDecay(_, Unit::Fraction) => 1.0,
        _ => f64::INFINITY,
    }
}

impl Trial {
    /// The score, where there is one.
    pub fn score(&self) -> Option<f64> {
        match self.outcome {
            Outcome::Score(score) => Some(score),
            Outcome::Error(_) => None,
        }
    }
}

impl TrialMetrics {
    /// Those of a plan.
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
