//! Search for the best length.

use serde::Serialize;

use super::outward::{self, longest};
use super::refine;
use super::trial::{Goal, Trial, TrialMetrics, TrialOutcome, Trials};
use crate::error::{Error, Result};
use crate::math::Profile;

/// End of the evaluated lengths at which the best one is. Beyond it there may be a better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Edge {
    /// No shorter average was evaluated.
    Shortest,
    /// No longer average was evaluated.
    Longest,
}

/// Search for the best length: first a list of targets, then golden-section steps around the best of them. If the best
/// is at an edge of the list, steps go outwards first, each longer than the one before.
///
/// All decisions follow from the trials alone. A search to which the trials of an earlier one are
/// [restored](Sweep::restore) therefore continues exactly as the earlier one would have.
///
/// ```
/// use posthoc_ema::{Profile, sweep::{Goal, Sweep, TrialMetrics, TrialOutcome}};
///
/// let targets = [0.05, 0.1, 0.15, 0.2].map(|s| Profile::sigma_rel(s).unwrap());
/// let mut sweep = Sweep::new(&targets, Goal::Minimize, 6)?;
/// loop {
///     let profiles = sweep.next(10, &|_| true);
///     if profiles.is_empty() {
///         break;
///     }
///     for profile in profiles {
///         let score = (profile.as_sigma_rel().unwrap() - 0.137).powi(2); // the evaluation
///         sweep.record(profile, TrialOutcome::Score(score), TrialMetrics::default());
///     }
/// }
/// let best = sweep.best().unwrap().profile.as_sigma_rel().unwrap();
/// assert!((best - 0.137).abs() < 0.005);
/// # Ok::<(), posthoc_ema::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sweep {
    targets: Vec<Profile>,
    refine: usize,
    trials: Trials,
}

impl Sweep {
    /// Searches a list of targets, then takes at most `refine` steps around the best one. A repeated target is
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
        Ok(Sweep { targets: distinct, refine, trials: Trials::new(goal) })
    }

    /// Adds the trials of an earlier search, which are not evaluated again. Failed trials are left out, so that they
    /// are tried again.
    pub fn restore(&mut self, trials: Vec<Trial>) {
        self.trials.extend(trials.into_iter().filter(|trial| trial.score().is_some()));
    }

    /// Returns the profiles to evaluate next: up to `batch` targets of the list, then one refinement at a time. Returns
    /// none when the search is over, or if the [curve is flat](Sweep::is_flat).
    ///
    /// If the best target is at an edge of the list, refinements go outwards first, to lengths that `is_reached`
    /// allows.
    /// Profiles are returned again until they are recorded.
    pub fn next(&self, batch: usize, is_reached: &dyn Fn(&Profile) -> bool) -> Vec<Profile> {
        let open: Vec<Profile> = self.open_targets().take(batch.max(1)).cloned().collect();
        if !open.is_empty() || self.is_flat() || self.refined() >= self.refine {
            return open;
        }
        let outward = outward::next_profile(&self.trials, is_reached);
        outward.or_else(|| refine::next_profile(&self.trials)).into_iter().collect()
    }

    /// Records the outcome of an evaluation. A score that is NaN or infinite counts as a failure.
    pub fn record(&mut self, profile: Profile, outcome: TrialOutcome, metrics: TrialMetrics) -> &Trial {
        let outcome = match outcome {
            TrialOutcome::Score(score) if !score.is_finite() => {
                TrialOutcome::Error(format!("the score is {score}: a finite number is needed"))
            }
            other => other,
        };
        let refined = !self.targets.contains(&profile);
        self.trials.record(Trial { profile, outcome, metrics, refined })
    }

    /// Targets of the list, without repetitions.
    pub fn targets(&self) -> &[Profile] {
        &self.targets
    }

    /// Direction in which scores are better.
    pub fn goal(&self) -> Goal {
        self.trials.goal()
    }

    /// All trials, in the order of their evaluation.
    pub fn trials(&self) -> &[Trial] {
        self.trials.as_slice()
    }

    /// Iterates over the failed trials, each with its reason.
    pub fn failures(&self) -> impl Iterator<Item = (&Trial, &str)> {
        self.trials().iter().filter_map(|trial| match &trial.outcome {
            TrialOutcome::Error(why) => Some((trial, why.as_str())),
            TrialOutcome::Score(_) => None,
        })
    }

    /// Returns the trial of a profile.
    pub fn trial(&self, profile: &Profile) -> Option<&Trial> {
        self.trials.get(profile)
    }

    /// Returns the trial of the best score, the first of equal ones. Returns `None` if no evaluation succeeded.
    pub fn best(&self) -> Option<&Trial> {
        self.trials.best()
    }

    /// Returns the end of the evaluated lengths of its family at which the best trial is, if it is at one. A wider list
    /// may then do better.
    ///
    /// The only trial of a family has no edge. Neither has a flat curve, nor the greatest length of a family, beyond
    /// which nothing exists.
    pub fn edge(&self) -> Option<Edge> {
        if self.is_flat() {
            return None;
        }
        let (family, best) = self.best()?.profile.family()?;
        let scored = self.trials.of_family(family).filter(|(trial, _)| trial.score().is_some());
        let lengths: Vec<f64> = scored.map(|(_, length)| length).collect();
        let has_shorter = lengths.iter().any(|&length| length < best);
        let has_longer = lengths.iter().any(|&length| length > best);
        match (has_shorter, has_longer) {
            (false, true) => Some(Edge::Shortest),
            (true, false) if best < longest(family) * (1.0 - 1e-12) => Some(Edge::Longest),
            _ => None,
        }
    }

    /// Returns true if the best trial is at an edge, and `is_reached` allows no step beyond it.
    pub fn is_at_limit(&self, is_reached: &dyn Fn(&Profile) -> bool) -> bool {
        self.edge().is_some() && outward::next_profile(&self.trials, is_reached).is_none()
    }

    /// Returns true if at least three lengths of the best one's family have a score, and all have the same one.
    pub fn is_flat(&self) -> bool {
        let Some((family, _)) = self.best().and_then(|best| best.profile.family()) else { return false };
        let scores: Vec<f64> = self.trials.of_family(family).filter_map(|(trial, _)| trial.score()).collect();
        scores.len() >= 3 && scores.iter().all(|score| *score == scores[0])
    }

    /// Estimates the total number of evaluations. The search may end sooner.
    pub fn planned(&self) -> usize {
        let refinements =
            if self.targets.len() > 1 && !self.is_flat() { self.refine.saturating_sub(self.refined()) } else { 0 };
        self.trials().len() + self.open_targets().count() + refinements
    }

    /// Iterates over the targets of the list that have no trial.
    fn open_targets(&self) -> impl Iterator<Item = &Profile> {
        self.targets.iter().filter(|target| self.trial(target).is_none())
    }

    /// Number of refinements around the current best. Those around the best of an earlier, shorter list do not count.
    fn refined(&self) -> usize {
        refine::steps_around_best(&self.trials)
    }
}
