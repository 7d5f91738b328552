//! Search for the best length.

use serde::Serialize;

use super::comparison::{Comparison, compare};
use super::curve::Trials;
use super::outward::{self, longest};
use super::refine;
use super::scores::Scores;
use super::trial::{Goal, Metric, Trial, TrialMetrics, TrialOutcome};
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
    repeats: u32,
    /// Number of refinements at a time.
    width: usize,
    /// The only metric that is refined; `None` for all.
    focus: Option<usize>,
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
        Ok(Sweep { targets: distinct, refine, repeats: 1, width: 1, focus: None, trials: Trials::new(goal) })
    }

    /// Repeats each evaluation, so that the scores have a [standard error](Sweep::comparison).
    pub fn with_repeats(self, repeats: u32) -> Sweep {
        Sweep { repeats: repeats.max(1), ..self }
    }

    /// Takes several refinements at a time, which are evaluated side by side. They cut the segments beside the best
    /// trial evenly. Their number over all is as without this. Six of them leave at most 14% of the range one after the
    /// other, 12% two at a time, and 17% four at a time.
    ///
    /// The trials depend on `width` and on the scores, not on the order in which evaluations end. If a search is
    /// interrupted while it evaluates several, it may choose others for the rest of them.
    pub fn with_width(self, width: usize) -> Sweep {
        Sweep { width: width.max(1), ..self }
    }

    /// As [`Sweep::with_width`], as wide as repeats leave work for a number of jobs.
    pub fn with_jobs(self, jobs: u32) -> Sweep {
        let width = jobs.max(1).div_ceil(self.repeats);
        self.with_width(width as usize)
    }

    /// Refines around the best by one metric only.
    pub(super) fn with_focus(self, metric: usize) -> Sweep {
        Sweep { focus: Some(metric), ..self }
    }

    /// Takes several metrics from each evaluation. Each has its own best, which is refined by itself. An empty list
    /// changes nothing.
    ///
    /// # Errors
    /// [`Error::Setting`] if two have one name.
    pub fn with_metrics(self, metrics: &[Metric]) -> Result<Sweep> {
        let is_repeated = |(i, metric): (usize, &Metric)| metrics[..i].iter().any(|other| other.name == metric.name);
        if let Some((_, metric)) = metrics.iter().enumerate().find(|(i, metric)| is_repeated((*i, metric))) {
            return Err(Error::Setting { option: "metric", reason: format!("{} is given twice", metric.name) });
        }
        if metrics.is_empty() {
            return Ok(self);
        }
        Ok(Sweep { trials: self.trials.with_metrics(metrics.to_vec()), ..self })
    }

    /// Adds the trials of an earlier search, which are not evaluated again. Failed evaluations are left out, so that
    /// they are tried again.
    pub fn restore(&mut self, mut trials: Vec<Trial>) {
        trials.iter_mut().for_each(Trial::rescore);
        self.trials.extend(trials.into_iter().filter(|trial| trial.score().is_some()));
    }

    /// Adds trials of this search, failed ones included.
    pub(super) fn restore_all(&mut self, trials: Vec<Trial>) {
        self.trials.extend(trials.into_iter());
    }

    /// Returns the profiles to evaluate next: up to `batch` targets of the list, then one refinement at a time, or
    /// [several](Sweep::with_width). Returns none when the search is over, or if the [curve is flat](Sweep::is_flat).
    ///
    /// If the best target is at an edge of the list, refinements go outwards first, to lengths that `is_reached`
    /// allows.
    /// Profiles are returned again until they are recorded.
    pub fn next(&self, batch: usize, is_reached: &dyn Fn(&Profile) -> bool) -> Vec<Profile> {
        let open: Vec<Profile> = self.open().take(batch.max(1)).cloned().collect();
        if !open.is_empty() {
            return open;
        }
        let width = self.width.min(batch.max(1));
        let metrics: Vec<usize> = self.refined_metrics().collect();
        let mut chosen: Vec<Profile> = Vec::with_capacity(width);
        for (i, &metric) in metrics.iter().enumerate() {
            let share = (width - chosen.len()).div_ceil(metrics.len() - i);
            let steps = self.refinements(metric, share, is_reached);
            let is_new = |profile: &Profile| !chosen.contains(profile);
            let new: Vec<Profile> = steps.into_iter().filter(is_new).collect();
            chosen.extend(new);
        }
        chosen
    }

    /// Returns at most `count` refinements by a metric.
    fn refinements(&self, metric: usize, count: usize, is_reached: &dyn Fn(&Profile) -> bool) -> Vec<Profile> {
        let curve = self.trials.by(metric);
        let count = count.min(self.refinements_left(metric));
        // The optimum may be on either side of the edge.
        let mut steps = outward::next_profiles(curve, count.div_ceil(2), is_reached);
        steps.extend(refine::next_profiles(curve, count - steps.len()));
        steps
    }

    /// Returns the number of refinements that are left for a metric.
    fn refinements_left(&self, metric: usize) -> usize {
        match self.is_flat_by(metric) {
            true => 0,
            false => self.refine.saturating_sub(refine::steps_around_best(self.trials.by(metric))),
        }
    }

    /// Iterates over the metrics that are refined.
    fn refined_metrics(&self) -> impl Iterator<Item = usize> {
        let focus = self.focus;
        (0..self.metrics().len()).filter(move |metric| focus.is_none_or(|focus| focus == *metric))
    }

    /// Numbers of the repeats that a profile still needs, from 1.
    pub fn missing(&self, profile: &Profile) -> Vec<u32> {
        self.trial(profile).map_or_else(|| (1..=self.repeats).collect(), |trial| trial.missing(self.repeats))
    }

    /// Records the only evaluation of a profile, of one metric. A score that is NaN or infinite counts as a failure.
    pub fn record(&mut self, profile: Profile, outcome: TrialOutcome, metrics: TrialMetrics) -> &Trial {
        let scores = match outcome {
            TrialOutcome::Score(score) => Ok(score.into()),
            TrialOutcome::Error(why) => Err(why),
        };
        self.add(Trial::new(profile), 1, scores, metrics)
    }

    /// Records a repeat of an evaluation. A value that is NaN or infinite counts as a failure. The trial has failed if
    /// one of its repeats did.
    pub fn record_repeat(
        &mut self,
        profile: Profile,
        repeat: u32,
        scores: std::result::Result<Scores, String>,
        metrics: TrialMetrics,
    ) -> &Trial {
        let trial = self.trial(&profile).cloned().unwrap_or_else(|| Trial::new(profile));
        self.add(trial, repeat, scores, metrics)
    }

    fn add(
        &mut self,
        mut trial: Trial,
        repeat: u32,
        scores: std::result::Result<Scores, String>,
        metrics: TrialMetrics,
    ) -> &Trial {
        let names: Vec<String> = self.metrics().iter().map(|metric| metric.name.clone()).collect();
        trial.refined = !self.targets.contains(&trial.profile);
        trial.add(repeat, scores.and_then(|scores| scores.checked(&names)), metrics);
        self.trials.record(trial)
    }

    /// Gives the trials of the last batch the order of its profiles, whatever order their evaluations ended in.
    pub fn arrange(&mut self, batch: &[Profile]) {
        self.trials.arrange(batch);
    }

    /// Targets of the list, without repetitions.
    pub fn targets(&self) -> &[Profile] {
        &self.targets
    }

    /// Direction in which scores are better: that of the first metric.
    pub fn goal(&self) -> Goal {
        self.metrics()[0].goal
    }

    /// Metrics of an evaluation; one of the name `score` if none was named.
    pub fn metrics(&self) -> &[Metric] {
        self.trials.metrics()
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

    /// Returns the best trial by the first metric. Returns `None` if no evaluation succeeded.
    ///
    /// It is the trial of the best score, the first of equal ones. If evaluations were repeated, it is that of the
    /// [comparison](Sweep::comparison).
    pub fn best(&self) -> Option<&Trial> {
        self.best_by(0)
    }

    /// As [`Sweep::best`], by the index of a metric.
    pub fn best_by(&self, metric: usize) -> Option<&Trial> {
        let curve = self.trials.by(metric);
        match compare(curve) {
            Some(comparison) => curve.get(&comparison.best),
            None => curve.best(),
        }
    }

    /// Compares the trials by the index of a metric. Returns `None` if the evaluations were not repeated.
    pub fn comparison(&self, metric: usize) -> Option<Comparison> {
        compare(self.trials.by(metric))
    }

    /// Returns the trials that no other one beats: none is as good in all metrics, and better in one.
    pub fn unbeaten(&self) -> Vec<&Trial> {
        self.trials.unbeaten()
    }

    /// Returns the end of the evaluated lengths of its family at which the best trial is, if it is at one. A wider list
    /// may then do better.
    ///
    /// The only trial of a family has no edge. Neither has a flat curve, nor the greatest length of a family, beyond
    /// which nothing exists.
    pub fn edge(&self) -> Option<Edge> {
        self.edge_by(0)
    }

    /// As [`Sweep::edge`], by the index of a metric.
    pub fn edge_by(&self, metric: usize) -> Option<Edge> {
        if self.is_flat_by(metric) {
            return None;
        }
        let (family, best) = self.best_by(metric)?.profile.family()?;
        let scored = self.trials.by(metric).of_family(family).filter(|(trial, _)| trial.score().is_some());
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
        self.edge().is_some() && outward::next_profiles(self.trials.by(0), 1, is_reached).is_empty()
    }

    /// Returns true if at least three lengths of the best one's family have a score, and all have the same one. If
    /// evaluations were repeated, the same within their noise.
    pub fn is_flat(&self) -> bool {
        self.is_flat_by(0)
    }

    /// As [`Sweep::is_flat`], by the index of a metric.
    pub fn is_flat_by(&self, metric: usize) -> bool {
        let curve = self.trials.by(metric);
        let Some((best, (family, _))) = curve.best().and_then(|best| Some((best, best.profile.family()?))) else {
            return false;
        };
        let comparison = compare(curve);
        let is_alike = |trial: &Trial| match &comparison {
            Some(comparison) => comparison.as_good.contains(&trial.profile),
            None => curve.score(trial) == curve.score(best),
        };
        let trials = curve.of_family(family).map(|(trial, _)| trial);
        let scored: Vec<&Trial> = trials.filter(|trial| curve.score(trial).is_some()).collect();
        scored.len() >= 3 && scored.into_iter().all(is_alike)
    }

    /// Number of evaluations so far.
    pub fn done(&self) -> usize {
        self.trials().iter().map(Trial::evaluations).sum()
    }

    /// Estimates the total number of evaluations. The search may end sooner.
    pub fn planned(&self) -> usize {
        let left = |metric| self.refinements_left(metric);
        let refinements = if self.targets.len() > 1 { self.refined_metrics().map(left).sum() } else { 0 };
        let open: usize = self.open().map(|profile| self.missing(profile).len()).sum();
        self.done() + open + refinements * self.repeats as usize
    }

    /// Iterates over the profiles that need an evaluation: trials with too few repeats, and targets without a trial.
    fn open(&self) -> impl Iterator<Item = &Profile> {
        let is_short = |trial: &&Trial| trial.score().is_some() && !trial.missing(self.repeats).is_empty();
        let short = self.trials().iter().filter(is_short).map(|trial| &trial.profile);
        short.chain(self.targets.iter().filter(|target| self.trial(target).is_none()))
    }
}
