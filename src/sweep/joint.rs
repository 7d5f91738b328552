//! Joint search for the lengths of groups of tensors: a sweep along one of them at a time.

use std::collections::BTreeMap;

use super::curve::Trials;
use super::search::Sweep;
use super::trial::Trial;
use crate::math::Profile;

/// Coordinate search for the best targets of the groups and of the tensors in none of them.
///
/// The first stage is a sweep with one length for all. Each further one varies the length of one part, with the others
/// at their best so far, in turns: first that of the tensors without a group, then those of the groups. The search ends
/// when no part changed in a whole turn, or after `rounds` turns. Each metric has a search of its own, which begins
/// with the best of the first stage. Without groups the first stage is all.
#[derive(Clone, Debug)]
pub struct JointSearch {
    groups: Vec<String>,
    rounds: usize,
    /// Search of a stage, without trials.
    template: Sweep,
    /// Trials of earlier stages, and of later ones of an interrupted sweep.
    trials: Vec<Trial>,
    stage: SearchStage,
    /// Last sweep along each part, by metric and part.
    lines: BTreeMap<(usize, usize), Sweep>,
    ends: Vec<SearchEnd>,
}

/// Sweep along one length of a joint sweep, with the other ones at their best.
#[derive(Clone, Debug)]
pub struct SweepLine {
    /// Index of the metric whose best it looks for.
    pub metric: usize,
    /// Name of the group or of the second run that has the length; `None` for the tensors without a group.
    pub part: Option<String>,
    /// Trials along the line, each with the profile of this part.
    pub sweep: Sweep,
}

/// Sweep along one part.
#[derive(Clone, Debug)]
struct SearchStage {
    metric: usize,
    number: usize,
    sweep: Sweep,
    /// Best targets so far, of the tensors without a group first; empty in the first stage.
    point: Vec<Profile>,
    /// Number of the last stages that changed nothing.
    unchanged: usize,
}

/// End of the search by one metric.
#[derive(Clone, Debug)]
struct SearchEnd {
    point: Vec<Profile>,
    /// True if no part changed in a whole turn.
    is_settled: bool,
}

impl JointSearch {
    /// Begins or continues a search. `template` is the sweep of a stage, without trials. Failed `trials` are tried
    /// again.
    pub fn new(template: Sweep, groups: &[String], rounds: usize, trials: Vec<Trial>) -> JointSearch {
        let mut all = template.clone();
        all.restore(trials);
        let stage = SearchStage::first(0, template.clone());
        let mut search = JointSearch {
            groups: groups.to_vec(),
            rounds,
            template,
            trials: all.trials().to_vec(),
            stage,
            lines: BTreeMap::new(),
            ends: Vec::new(),
        };
        search.stage.sweep = search.stage_sweep();
        search
    }

    /// Sweep of the current stage.
    pub fn sweep(&self) -> &Sweep {
        &self.stage.sweep
    }

    /// As [`JointSearch::sweep`], to record trials.
    pub fn sweep_mut(&mut self) -> &mut Sweep {
        &mut self.stage.sweep
    }

    /// Returns the targets of all parts for a profile of the current stage: that of the tensors without a group, then
    /// that of each group.
    pub fn point(&self, profile: &Profile) -> Vec<Profile> {
        let mut point = self.stage.point.clone();
        match self.part() {
            None => point = vec![profile.clone(); self.groups.len() + 1],
            Some(part) => point[part] = profile.clone(),
        }
        point
    }

    /// Ends the current stage, and begins the next one. Returns false if the search is over.
    pub fn advance(&mut self) -> bool {
        self.trials = self.trials();
        let metric = self.stage.metric;
        let Some(best) = self.stage.sweep.best_by(metric).map(|best| best.profile.clone()) else { return false };
        let point = self.point(&best);
        let parts = self.groups.len() + 1;
        if let Some(part) = self.part() {
            self.lines.insert((metric, part), self.stage.sweep.clone());
        }
        let unchanged = if self.stage.point == point { self.stage.unchanged + 1 } else { 0 };
        let is_settled = parts == 1 || unchanged >= parts;
        if !is_settled && self.stage.number < self.rounds * parts {
            let number = self.stage.number + 1;
            self.stage = SearchStage { metric, number, sweep: self.template.clone(), point, unchanged };
        } else {
            if self.ends.len() == metric {
                self.ends.push(SearchEnd { point, is_settled });
            }
            if parts == 1 || metric + 1 == self.template.metrics().len() {
                return false;
            }
            self.stage = SearchStage::first(metric + 1, self.template.clone());
        }
        self.stage.sweep = self.stage_sweep();
        true
    }

    /// All trials, each with the targets of the groups.
    pub fn trials(&self) -> Vec<Trial> {
        let own: Vec<Trial> = self.stage.sweep.trials().iter().map(|trial| self.to_joint(trial)).collect();
        let is_replaced = |trial: &Trial| own.iter().any(|other| other.has_targets_of(trial));
        let mut trials: Vec<Trial> = self.trials.iter().filter(|trial| !is_replaced(trial)).cloned().collect();
        trials.extend(own);
        trials
    }

    /// Number of evaluations of all trials, failed ones included.
    pub fn evaluations(&self) -> usize {
        self.trials().iter().map(Trial::evaluations).sum()
    }

    /// Returns the best trial by the index of a metric, with the targets of the groups. Returns `None` if no evaluation
    /// succeeded.
    ///
    /// It is the end of the metric's search. Without repeats, a better trial of another metric's search comes first.
    pub fn best_by(&self, metric: usize) -> Option<Trial> {
        if self.groups.is_empty() {
            return self.stage.sweep.best_by(metric).cloned();
        }
        let trials = self.all();
        let end = self.ends.get(metric).and_then(|end| {
            let is_end = |trial: &&Trial| self.point_of(trial).as_ref() == Some(&end.point);
            trials.as_slice().iter().find(is_end)
        });
        let curve = trials.by(metric);
        let best = match (end, curve.best()) {
            (Some(end), Some(best)) if end.repeats.len() > 1 || !curve.is_better(best, end) => Some(end),
            (_, best) => best,
        };
        best.cloned()
    }

    /// Returns the trials that no other one beats: none is as good in all metrics, and better in one.
    pub fn unbeaten(&self) -> Vec<Trial> {
        self.all().unbeaten().into_iter().cloned().collect()
    }

    /// Returns the last sweep along each length, by metric. Without groups there is none.
    pub fn lines(&self) -> Vec<SweepLine> {
        let name = |part: usize| part.checked_sub(1).map(|group| self.groups[group].clone());
        let line = |(&(metric, part), sweep): (&(usize, usize), &Sweep)| SweepLine {
            metric,
            part: name(part),
            sweep: sweep.clone(),
        };
        self.lines.iter().map(line).collect()
    }

    /// Returns true if no length changed in the last turn of any metric's search. If the turns ended before, more of
    /// them may do better.
    pub fn is_settled(&self) -> bool {
        self.ends.iter().all(|end| end.is_settled)
    }

    /// Metrics whose best the current stage looks for, by index.
    pub(super) fn stage_metrics(&self) -> std::ops::Range<usize> {
        let metric = self.stage.metric;
        if self.part().is_none() { 0..self.template.metrics().len() } else { metric..metric + 1 }
    }

    /// Returns a trial of the current stage with the targets of the groups.
    pub fn to_joint(&self, trial: &Trial) -> Trial {
        let mut point = self.point(&trial.profile);
        let base = point.remove(0);
        Trial { profile: base, groups: self.groups.iter().cloned().zip(point).collect(), ..trial.clone() }
    }

    /// Returns the targets of a joint trial; `None` if it lacks one.
    pub(super) fn point_of(&self, trial: &Trial) -> Option<Vec<Profile>> {
        let of_groups = self.groups.iter().map(|group| trial.groups.get(group).cloned());
        std::iter::once(Some(trial.profile.clone())).chain(of_groups).collect()
    }

    /// All trials, ordered by each metric.
    fn all(&self) -> Trials {
        let metrics = self.template.metrics().to_vec();
        let mut trials = Trials::new(self.template.goal()).with_metrics(metrics);
        trials.extend(self.trials().into_iter());
        trials
    }

    /// Part that the current stage varies; `None` if all have one length.
    fn part(&self) -> Option<usize> {
        self.stage.number.checked_sub(1).map(|turns| turns % (self.groups.len() + 1))
    }

    /// Returns the search of the current stage, with the trials that are on its line.
    fn stage_sweep(&self) -> Sweep {
        let sweep = self.template.clone();
        let mut sweep = if self.part().is_none() { sweep } else { sweep.with_focus(self.stage.metric) };
        sweep.restore_all(self.trials.iter().filter_map(|trial| self.on_line(trial)).collect());
        sweep
    }

    /// Returns a trial of the current stage for a joint one, if it differs in no other part.
    fn on_line(&self, trial: &Trial) -> Option<Trial> {
        let point = self.point_of(trial)?;
        let profile = point[self.part().unwrap_or(0)].clone();
        (self.point(&profile) == point).then(|| {
            let refined = !self.template.targets().contains(&profile);
            Trial { profile, refined, groups: BTreeMap::new(), ..trial.clone() }
        })
    }
}

impl SearchStage {
    /// First stage of the search by a metric, whose trials are the same for all metrics.
    fn first(metric: usize, sweep: Sweep) -> SearchStage {
        SearchStage { metric, number: 0, sweep, point: Vec::new(), unchanged: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::{Goal, Metric, TrialMetrics};

    fn template(refine: usize) -> Sweep {
        let targets = [0.05, 0.1, 0.15, 0.2, 0.25].map(|sigma_rel| Profile::sigma_rel(sigma_rel).unwrap());
        Sweep::new(&targets, Goal::Minimize, refine).unwrap()
    }

    fn length(profile: &Profile) -> f64 {
        profile.family().unwrap().1
    }

    /// Runs at most `evaluations` evaluations, and returns true if the search ended.
    fn run(search: &mut JointSearch, evaluations: usize, score: &dyn Fn(&[f64]) -> Option<f64>) -> bool {
        let mut left = evaluations;
        loop {
            let profiles = search.sweep().next(1, &|_| false);
            let Some(profile) = profiles.into_iter().next() else {
                if search.advance() {
                    continue;
                }
                return true;
            };
            if left == 0 {
                return false;
            }
            left -= 1;
            let point: Vec<f64> = search.point(&profile).iter().map(length).collect();
            let scores = score(&point).map(Into::into).ok_or_else(|| "no".to_owned());
            search.sweep_mut().record_repeat(profile, 1, scores, TrialMetrics::default());
        }
    }

    /// A bowl whose axes lean a little: the optimum of one part depends on that of the others.
    fn bowl(point: &[f64]) -> Option<f64> {
        let [a, b, c] = [point[0] - 0.08, point[1] - 0.18, point[2] - 0.13];
        Some(a * a + b * b + c * c + 0.3 * a * b - 0.2 * b * c)
    }

    #[test]
    fn joint_search_finds_the_best_length_of_each_part() {
        let groups = ["decoder.*", "head.*"].map(str::to_owned);
        let mut search = JointSearch::new(template(8), &groups, 3, Vec::new());
        assert!(run(&mut search, usize::MAX, &bowl));
        let best = search.sweep().best().unwrap().profile.clone();
        for (found, expected) in search.point(&best).iter().zip([0.08, 0.18, 0.13]) {
            assert!((length(found) - expected).abs() < 0.006, "{found}: {expected}");
        }
        let trials = search.trials();
        for (i, trial) in trials.iter().enumerate() {
            let is_twin = |other: &Trial| other.profile == trial.profile && other.groups == trial.groups;
            assert!(!trials[..i].iter().any(is_twin) && trial.groups.len() == 2, "no point is evaluated twice");
        }
        let text = serde_json::to_string(&trials).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Trial>>(&text).unwrap(), trials);
    }

    #[test]
    fn search_without_groups_is_one_sweep() {
        let mut search = JointSearch::new(template(4), &[], 3, Vec::new());
        assert!(run(&mut search, usize::MAX, &|point| Some((point[0] - 0.12).abs())));
        assert_eq!(search.trials(), search.sweep().trials());
        assert_eq!(search.trials().len(), 9);
    }

    /// A search that is interrupted after any evaluation ends at the same point after the same trials.
    #[test]
    fn interrupted_joint_search_ends_with_same_trials() {
        let groups = ["decoder.*", "head.*"].map(str::to_owned);
        let score = |point: &[f64]| bowl(point).filter(|_| (point[1] - 0.2).abs() > 1e-9);
        let begin = |trials| JointSearch::new(template(2), &groups, 2, trials);
        let mut whole = begin(Vec::new());
        assert!(run(&mut whole, usize::MAX, &score));
        let count = whole.trials().len();
        assert!(whole.trials().iter().any(|trial| trial.score().is_none()));
        let sorted = |search: &JointSearch| {
            let mut texts: Vec<String> = search.trials().iter().map(|trial| format!("{trial:?}")).collect();
            texts.sort_unstable();
            texts
        };
        for done in (0..count).step_by(3) {
            let mut first = begin(Vec::new());
            assert!(!run(&mut first, done, &score));
            let mut second = begin(first.trials());
            assert!(run(&mut second, usize::MAX, &score));
            assert_eq!(sorted(&second), sorted(&whole), "after {done}");
        }
    }

    /// Search of two groups by two metrics whose optima differ, with a failure.
    fn by_two_metrics(rounds: usize, trials: Vec<Trial>) -> JointSearch {
        let metrics = ["near", "far:max"].map(|metric| Metric::parse(metric).unwrap());
        let groups = ["decoder.*", "head.*"].map(str::to_owned);
        JointSearch::new(template(3).with_metrics(&metrics).unwrap(), &groups, rounds, trials)
    }

    /// Runs at most `evaluations` evaluations of both metrics, and returns true if the search ended.
    fn run_metrics(search: &mut JointSearch, evaluations: usize) -> bool {
        let mut left = evaluations;
        loop {
            let profiles = search.sweep().next(1, &|_| false);
            if profiles.is_empty() {
                if search.advance() {
                    continue;
                }
                return true;
            }
            for profile in profiles {
                if left == 0 {
                    return false;
                }
                left -= 1;
                let point: Vec<f64> = search.point(&profile).iter().map(length).collect();
                let far = -(point[0] - 0.2).powi(2) - (point[1] - 0.07).powi(2) - (point[2] - 0.22).powi(2);
                let scores = bowl(&point).filter(|_| (point[1] - 0.2).abs() > 1e-9).map(|near| vec![near, far].into());
                let scores = scores.ok_or_else(|| "no".to_owned());
                search.sweep_mut().record_repeat(profile, 1, scores, TrialMetrics::default());
            }
        }
    }

    #[test]
    fn each_metric_of_a_joint_search_has_its_own_best() {
        let mut search = by_two_metrics(3, Vec::new());
        assert!(run_metrics(&mut search, usize::MAX));
        for (metric, optimum) in [(0, [0.08, 0.18, 0.13]), (1, [0.2, 0.07, 0.22])] {
            let best = search.best_by(metric).unwrap();
            let point = search.point_of(&best).unwrap();
            for (found, expected) in point.iter().zip(optimum) {
                assert!((length(found) - expected).abs() < 0.025, "{metric}: {found} is not {expected}");
            }
            let is_better = |trial: &Trial| {
                let (one, other) = (trial.mean(metric).unwrap(), best.mean(metric).unwrap());
                if metric == 0 { one < other } else { one > other }
            };
            let trials = search.trials();
            assert!(!trials.iter().filter(|trial| trial.score().is_some()).any(is_better), "{metric}");
            assert!(search.unbeaten().contains(&best));
        }
        let lines: Vec<(usize, Option<String>)> =
            search.lines().into_iter().map(|line| (line.metric, line.part)).collect();
        let parts = [None, Some("decoder.*".to_owned()), Some("head.*".to_owned())];
        assert!(lines.into_iter().eq((0..2).flat_map(|metric| parts.iter().map(move |part| (metric, part.clone())))));
        // A trial that is worse in both metrics is beaten.
        let unbeaten = search.unbeaten();
        let value = |trial: &Trial| [trial.mean(0).unwrap(), -trial.mean(1).unwrap()];
        for trial in search.trials().iter().filter(|trial| trial.score().is_some()) {
            let beats = |other: &&Trial| {
                let (one, other) = (value(trial), value(other));
                other[0] <= one[0] && other[1] <= one[1] && other != one
            };
            assert_eq!(unbeaten.contains(trial), unbeaten.iter().find(beats).is_none(), "{trial:?}");
        }
    }

    #[test]
    fn interrupted_search_by_two_metrics_ends_with_same_trials() {
        let mut whole = by_two_metrics(1, Vec::new());
        assert!(run_metrics(&mut whole, usize::MAX));
        let sorted = |search: &JointSearch| {
            let mut texts: Vec<String> = search.trials().iter().map(|trial| format!("{trial:?}")).collect();
            texts.sort_unstable();
            texts
        };
        for done in (0..whole.trials().len()).step_by(5) {
            let mut first = by_two_metrics(1, Vec::new());
            assert!(!run_metrics(&mut first, done));
            let mut second = by_two_metrics(1, first.trials());
            assert!(run_metrics(&mut second, usize::MAX));
            assert_eq!(sorted(&second), sorted(&whole), "after {done}");
            let best = |search: &JointSearch| [0, 1].map(|metric| search.best_by(metric));
            assert_eq!(best(&second), best(&whole), "after {done}");
        }
        assert!(!whole.is_settled(), "one turn");
    }

    /// One part has no effect but noise: its line is flat.
    #[test]
    fn repeats_compare_along_each_line() {
        let template = template(2).with_repeats(3);
        let mut search = JointSearch::new(template, &["decoder.*".to_owned()], 4, Vec::new());
        loop {
            let Some(profile) = search.sweep().next(1, &|_| false).into_iter().next() else {
                if search.advance() {
                    continue;
                }
                break;
            };
            let point: Vec<f64> = search.point(&profile).iter().map(length).collect();
            for repeat in search.sweep().missing(&profile) {
                // Noise of a thousandth that depends on the point and the repeat.
                let noise = 1e-3 * (1e6 * (point[0] + 7.0 * point[1]) * f64::from(repeat)).sin();
                let score = (point[0] - 0.1).powi(2) * 100.0 + noise;
                search.sweep_mut().record_repeat(profile.clone(), repeat, Ok(score.into()), TrialMetrics::default());
            }
        }
        assert!(search.is_settled());
        let lines = search.lines();
        let [base, decoder] = &lines[..] else { panic!("{} lines", lines.len()) };
        let [base_error, error] = [base, decoder].map(|line| line.sweep.comparison(0).unwrap().standard_error);
        assert!(base_error > 1e-4 && base_error < 1e-3 && error > 1e-4 && error < 1e-3);
        assert!(decoder.sweep.is_flat() && !base.sweep.is_flat());
        assert!(base.sweep.comparison(0).unwrap().as_good.len() < 4);
        assert!((length(&search.best_by(0).unwrap().profile) - 0.1).abs() < 0.02);
    }
}
