//! Trials of a sweep, and their order by one metric.

use super::trial::{Goal, Metric, Trial};
use crate::math::{Family, Profile};

/// Name of the only metric of an evaluation that returns one number.
pub(super) const SCORE: &str = "score";

/// Trials of a sweep in the order of their evaluation, at most one per profile.
#[derive(Clone, Debug)]
pub(super) struct Trials {
    metrics: Vec<Metric>,
    trials: Vec<Trial>,
}

/// Trials of a sweep, as one metric orders them.
#[derive(Clone, Copy)]
pub(super) struct Curve<'a> {
    trials: &'a [Trial],
    metric: usize,
    goal: Goal,
}

impl Trials {
    pub(super) fn new(goal: Goal) -> Trials {
        Trials { metrics: vec![Metric { name: SCORE.into(), goal }], trials: Vec::new() }
    }

    pub(super) fn with_metrics(self, metrics: Vec<Metric>) -> Trials {
        Trials { metrics, ..self }
    }

    pub(super) fn metrics(&self) -> &[Metric] {
        &self.metrics
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

    /// Gives the trials of a batch the order of its profiles. They are the last ones.
    pub(super) fn arrange(&mut self, batch: &[Profile]) {
        let place = |trial: &Trial| batch.iter().position(|profile| *profile == trial.profile);
        self.trials.sort_by_key(|trial| place(trial).map_or(0, |place| place + 1));
    }

    /// Returns the trial of a profile.
    pub(super) fn get(&self, profile: &Profile) -> Option<&Trial> {
        self.trials.iter().find(|trial| trial.profile == *profile)
    }

    /// Returns the trials that no other one beats: none is as good in all metrics, and better in one.
    pub(super) fn unbeaten(&self) -> Vec<&Trial> {
        let curves: Vec<Curve<'_>> = (0..self.metrics.len()).map(|metric| self.by(metric)).collect();
        let beats = |one: &Trial, other: &Trial| {
            curves.iter().all(|curve| !curve.is_better(other, one)) && curves.iter().any(|c| c.is_better(one, other))
        };
        let scored = || self.trials.iter().filter(|trial| trial.score().is_some());
        scored().filter(|trial| !scored().any(|other| beats(other, trial))).collect()
    }

    /// Returns the trials as a metric orders them, by its index.
    pub(super) fn by(&self, metric: usize) -> Curve<'_> {
        Curve { trials: &self.trials, metric, goal: self.metrics[metric].goal }
    }
}

impl<'a> Curve<'a> {
    pub(super) fn trials(&self) -> &'a [Trial] {
        self.trials
    }

    pub(super) fn metric(&self) -> usize {
        self.metric
    }

    /// Factor that makes small values the better ones.
    pub(super) fn sign(&self) -> f64 {
        if self.goal == Goal::Minimize { 1.0 } else { -1.0 }
    }

    /// Returns the mean of the metric, unless the evaluation failed.
    pub(super) fn score(&self, trial: &Trial) -> Option<f64> {
        trial.mean(self.metric)
    }

    /// Returns the trial of a profile.
    pub(super) fn get(&self, profile: &Profile) -> Option<&'a Trial> {
        self.trials.iter().find(|trial| trial.profile == *profile)
    }

    /// Returns the trial of the best score, the first of equal ones. Returns `None` if no evaluation succeeded.
    pub(super) fn best(&self) -> Option<&'a Trial> {
        let scored = self.trials.iter().filter(|trial| self.score(trial).is_some());
        scored.reduce(|best, trial| if self.is_better(trial, best) { trial } else { best })
    }

    /// Iterates over the trials of a family, each with its length.
    pub(super) fn of_family(self, family: Family) -> impl Iterator<Item = (&'a Trial, f64)> {
        self.trials.iter().filter_map(move |trial| match trial.profile.family() {
            Some((other, length)) if other == family => Some((trial, length)),
            _ => None,
        })
    }

    /// Returns true if a trial is strictly better than another. Every score is better than a failure.
    pub(super) fn is_better(&self, trial: &Trial, other: &Trial) -> bool {
        match (self.score(trial), self.score(other)) {
            (Some(score), Some(other)) => self.sign() * score < self.sign() * other,
            (score, other) => score.is_some() && other.is_none(),
        }
    }
}
