//! Joint search for the lengths of groups of tensors: a sweep along one of them at a time.

use std::collections::BTreeMap;

use super::search::Sweep;
use super::trial::Trial;
use crate::error::{Error, Result};
use crate::math::Profile;

/// Coordinate search for the best targets of the groups and of the tensors in none of them.
///
/// The first stage is a sweep with one length for all. Each further one varies the length of one part, with the others
/// at their best so far, in turns: first that of the tensors without a group, then those of the groups. The search ends
/// when no part changed in a whole turn, or after `rounds` turns. Without groups the first stage is all.
pub(super) struct JointSearch {
    groups: Vec<String>,
    rounds: usize,
    /// Search of a stage, without trials.
    template: Sweep,
    /// Trials of earlier stages, and of later ones of an interrupted sweep.
    trials: Vec<Trial>,
    stage: SearchStage,
}

/// Sweep along one part.
struct SearchStage {
    number: usize,
    sweep: Sweep,
    /// Best targets so far, of the tensors without a group first; empty in the first stage.
    point: Vec<Profile>,
    /// Number of the last stages that changed nothing.
    unchanged: usize,
}

impl JointSearch {
    /// Begins or continues a search.
    ///
    /// # Errors
    /// [`Error::Setting`] for groups together with several metrics.
    pub(super) fn new(template: Sweep, groups: &[String], rounds: usize, trials: Vec<Trial>) -> Result<JointSearch> {
        if !groups.is_empty() && template.metrics().len() > 1 {
            let reason = "a joint sweep looks for one best: give one metric".into();
            return Err(Error::Setting { option: "group", reason });
        }
        let mut all = template.clone();
        all.restore(trials);
        let sweep = template.clone();
        let stage = SearchStage { number: 0, sweep, point: Vec::new(), unchanged: 0 };
        let trials = all.trials().to_vec();
        let mut search = JointSearch { groups: groups.to_vec(), rounds, template, trials, stage };
        search.stage.sweep = search.stage_sweep();
        Ok(search)
    }

    /// Sweep of the current stage.
    pub(super) fn sweep(&self) -> &Sweep {
        &self.stage.sweep
    }

    /// As [`JointSearch::sweep`], to record trials.
    pub(super) fn sweep_mut(&mut self) -> &mut Sweep {
        &mut self.stage.sweep
    }

    /// Returns the targets of all parts for a profile of the current stage.
    pub(super) fn point(&self, profile: &Profile) -> Vec<Profile> {
        let mut point = self.stage.point.clone();
        match self.part() {
            None => point = vec![profile.clone(); self.groups.len() + 1],
            Some(part) => point[part] = profile.clone(),
        }
        point
    }

    /// Ends the current stage, and begins the next one. Returns false if the search is over.
    pub(super) fn advance(&mut self) -> bool {
        self.trials = self.trials();
        let Some(best) = self.stage.sweep.best().map(|best| best.profile.clone()) else { return false };
        let point = self.point(&best);
        let is_same = self.stage.point == point;
        let parts = self.groups.len() + 1;
        let unchanged = if is_same { self.stage.unchanged + 1 } else { 0 };
        if parts == 1 || unchanged >= parts || self.stage.number >= self.rounds * parts {
            return false;
        }
        let number = self.stage.number + 1;
        self.stage = SearchStage { number, sweep: self.template.clone(), point, unchanged };
        self.stage.sweep = self.stage_sweep();
        true
    }

    /// All trials, each with the targets of the groups.
    pub(super) fn trials(&self) -> Vec<Trial> {
        let own: Vec<Trial> = self.stage.sweep.trials().iter().map(|trial| self.to_joint(trial)).collect();
        let is_replaced = |trial: &Trial| own.iter().any(|o| o.profile == trial.profile && o.groups == trial.groups);
        let mut trials: Vec<Trial> = self.trials.iter().filter(|trial| !is_replaced(trial)).cloned().collect();
        trials.extend(own);
        trials
    }

    /// Returns the targets of the groups for a profile of the current stage.
    pub(super) fn group_targets(&self, profile: &Profile) -> BTreeMap<String, Profile> {
        self.groups.iter().cloned().zip(self.point(profile).into_iter().skip(1)).collect()
    }

    /// Part that the current stage varies; `None` if all have one length.
    fn part(&self) -> Option<usize> {
        self.stage.number.checked_sub(1).map(|turns| turns % (self.groups.len() + 1))
    }

    /// Returns a trial of the current stage with the targets of the groups.
    pub(super) fn to_joint(&self, trial: &Trial) -> Trial {
        let mut point = self.point(&trial.profile);
        let base = point.remove(0);
        Trial { profile: base, groups: self.groups.iter().cloned().zip(point).collect(), ..trial.clone() }
    }

    /// Returns the search of the current stage, with the trials that are on its line.
    fn stage_sweep(&self) -> Sweep {
        let mut sweep = self.template.clone();
        sweep.restore_all(self.trials.iter().filter_map(|trial| self.on_line(trial)).collect());
        sweep
    }

    /// Returns a trial of the current stage for a joint one, if it differs in no other part.
    fn on_line(&self, trial: &Trial) -> Option<Trial> {
        let of_groups = self.groups.iter().map(|group| trial.groups.get(group).cloned());
        let point: Vec<Profile> =
            std::iter::once(Some(trial.profile.clone())).chain(of_groups).collect::<Option<_>>()?;
        let profile = point[self.part().unwrap_or(0)].clone();
        (self.point(&profile) == point).then(|| {
            let refined = !self.template.targets().contains(&profile);
            Trial { profile, refined, groups: BTreeMap::new(), ..trial.clone() }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::{Goal, TrialMetrics};

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
        let mut search = JointSearch::new(template(8), &groups, 3, Vec::new()).unwrap();
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
        let mut search = JointSearch::new(template(4), &[], 3, Vec::new()).unwrap();
        assert!(run(&mut search, usize::MAX, &|point| Some((point[0] - 0.12).abs())));
        assert_eq!(search.trials(), search.sweep().trials());
        assert_eq!(search.trials().len(), 9);
    }

    /// A search that is interrupted after any evaluation ends at the same point after the same trials.
    #[test]
    fn interrupted_joint_search_ends_with_same_trials() {
        let groups = ["decoder.*", "head.*"].map(str::to_owned);
        let score = |point: &[f64]| bowl(point).filter(|_| (point[1] - 0.2).abs() > 1e-9);
        let begin = |trials| JointSearch::new(template(2), &groups, 2, trials).unwrap();
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
}
