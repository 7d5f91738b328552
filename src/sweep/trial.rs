//! Evaluated averages and their order.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::scores::Scores;
use crate::error::{Error, Result};
use crate::math::Profile;
use crate::planning::Plan;

/// Outcome of a trial without an evaluation.
const UNTRIED: &str = "it was not evaluated";

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

/// Quantity that an evaluation measures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metric {
    /// Name, of letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// Direction in which its values are better.
    pub goal: Goal,
}

/// Outcome of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrialOutcome {
    /// Finite score: the mean of the first metric over all repeats.
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
    /// Measured values by the number of the repeat, from 1. Empty for one value of one metric, which is the score.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub repeats: BTreeMap<u32, Scores>,
    /// Targets of groups of tensors, by glob, in a joint sweep. The other tensors have `profile`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub groups: BTreeMap<String, Profile>,
}

impl Trial {
    /// Returns the score, unless the evaluation failed.
    pub fn score(&self) -> Option<f64> {
        match self.outcome {
            TrialOutcome::Score(score) => Some(score),
            TrialOutcome::Error(_) => None,
        }
    }

    /// Returns the mean of a metric over all repeats, by the metric's index. Returns `None` if an evaluation failed.
    pub fn mean(&self, metric: usize) -> Option<f64> {
        let score = self.score()?;
        if metric == 0 { Some(score) } else { mean(self.repeats.values(), metric) }
    }

    /// Returns true if all targets are those of another trial.
    pub(super) fn has_targets_of(&self, other: &Trial) -> bool {
        self.profile == other.profile && self.groups == other.groups
    }

    /// Returns the numbers of the repeats up to `repeats` that are missing.
    pub(super) fn missing(&self, repeats: u32) -> Vec<u32> {
        let is_single = self.repeats.is_empty() && self.score().is_some();
        (1..=repeats).filter(|repeat| !(self.repeats.contains_key(repeat) || is_single && *repeat == 1)).collect()
    }

    /// Returns all values of a metric, repeat by repeat.
    pub(super) fn values(&self, metric: usize) -> Vec<f64> {
        match (self.repeats.is_empty(), self.score()) {
            (true, Some(score)) if metric == 0 => vec![score],
            _ => self.repeats.values().flat_map(|scores| scores.values(metric)).collect(),
        }
    }

    /// Number of evaluations, failed ones included.
    pub(super) fn evaluations(&self) -> usize {
        match self.score() {
            Some(_) => self.repeats.len().max(1),
            None => self.repeats.len() + 1,
        }
    }

    /// Trial without an evaluation.
    pub(super) fn new(profile: Profile) -> Trial {
        let outcome = TrialOutcome::Error(UNTRIED.into());
        Trial {
            profile,
            outcome,
            metrics: TrialMetrics::default(),
            refined: false,
            repeats: BTreeMap::new(),
            groups: BTreeMap::new(),
        }
    }

    /// Adds the values of a repeat. A failure keeps the values of the other repeats, and stays.
    pub(super) fn add(&mut self, repeat: u32, scores: Result<Scores, String>, metrics: TrialMetrics) {
        let seconds = [self.metrics.seconds, metrics.seconds].into_iter().flatten().reduce(|a, b| a + b);
        self.metrics = TrialMetrics { seconds, ..metrics };
        if let (true, Some(score)) = (self.repeats.is_empty(), self.score()) {
            self.repeats.insert(1, score.into());
        }
        let had_failed = matches!(&self.outcome, TrialOutcome::Error(why) if why != UNTRIED);
        match scores {
            Ok(scores) => {
                self.repeats.insert(repeat, scores);
                if !had_failed {
                    self.rescore();
                }
            }
            Err(_) if had_failed => {}
            Err(why) => self.outcome = TrialOutcome::Error(why),
        }
    }

    /// Makes the mean of the repeats the score, if there are any.
    pub(super) fn rescore(&mut self) {
        if let Some(score) = mean(self.repeats.values(), 0) {
            self.outcome = TrialOutcome::Score(score);
        }
        if self.repeats.len() == 1 && self.repeats.get(&1).is_some_and(Scores::is_single) {
            self.repeats.clear();
        }
    }
}

fn mean<'a>(repeats: impl Iterator<Item = &'a Scores>, metric: usize) -> Option<f64> {
    let values: Vec<f64> = repeats.flat_map(|scores| scores.values(metric)).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

impl Metric {
    /// Parses a name with a direction: `fid`, `fid:min` or `acc:max`.
    ///
    /// # Errors
    /// [`Error::Setting`] for an empty name, one of other characters, or another direction.
    pub fn parse(text: &str) -> Result<Metric> {
        let wrong = |reason: String| Error::Setting { option: "metric", reason };
        let (name, goal) = match text.split_once(':') {
            None | Some((_, "min")) => (text.split(':').next().unwrap_or(""), Goal::Minimize),
            Some((name, "max")) => (name, Goal::Maximize),
            Some((_, other)) => return Err(wrong(format!("`{text}` has the direction {other}: write min or max"))),
        };
        let is_allowed = |c: char| c.is_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || !name.chars().all(is_allowed) {
            return Err(wrong(format!("`{text}` has no name of letters, digits, `_`, `-` and `.`")));
        }
        Ok(Metric { name: name.to_owned(), goal })
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = if self.goal == Goal::Minimize { "min" } else { "max" };
        write!(f, "{}:{direction}", self.name)
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
