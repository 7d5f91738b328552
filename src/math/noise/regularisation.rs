//! The regularisation of one target.

use std::cell::Cell;

use super::super::profile::Profile;
use super::super::solve::{BlendSolution, Solution};
use super::{ErrorModel, ExpectedError};
use crate::error::Result;

/// Largest ratio of the expected errors with and without a regularisation at which the regularisation is used.
///
/// The error model does not see movement that comes and goes between two snapshots, so a smaller improvement may not be
/// real.
const MAX_ERROR_RATIO: f64 = 0.6;

/// Factor of the profile's part of the error in the choice of a regularisation.
///
/// A trajectory that differs from the model changes this part, not the rounding. Near the best regularisation the
/// factor costs little.
const PROFILE_FACTOR: f64 = 2.0;

/// Largest ratio to the smallest error at which a weaker regularisation is preferred.
const NEAR_BEST: f64 = 1.02;

/// Largest factor by which a regularisation may raise the expected error of any group of tensors.
const MAX_GROUP_RATIO: f64 = 1.05;

/// Largest ratio of the expected errors with and without a refused regularisation at which it is reported.
const MAX_REFUSED_RATIO: f64 = 0.95;

/// Powers of ten of `rho` in units of the target's norm.
///
/// At the lower end the weights do not change; at the upper end they become equal.
const POWERS: std::ops::RangeInclusive<i32> = -7..=1;

/// Distances from the best power of ten so far, each tried in both directions.
const REFINEMENTS: [f64; 2] = [0.5, 0.25];

/// A solution with its regularisation and expected error.
pub(crate) struct RegularisedSolution {
    pub solution: Solution,
    pub rho: f64,
    /// The expected error over all elements.
    pub expected: ExpectedError,
    /// The expected error of each group.
    pub groups: Vec<ExpectedError>,
    /// The residual on each update.
    pub residual: Vec<f64>,
    /// The better regularisation that a group forbids.
    pub refused: Option<RefusedRegularisation>,
}

/// Regularisation of a smaller expected error over all elements that would make a group much worse.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RefusedRegularisation {
    pub rho: f64,
    /// The expected error over all elements.
    pub expected: ExpectedError,
    /// Index of the group that would be worst off.
    pub group: usize,
}

impl RegularisedSolution {
    /// Returns the error that a regularisation is chosen by.
    fn cautious_error(&self) -> f64 {
        self.expected.cautious()
    }

    /// Returns true if no group's expected error is much larger than in `plain`.
    fn spares_groups(&self, plain: &RegularisedSolution) -> bool {
        let spares = |(error, plain): (&ExpectedError, &ExpectedError)| {
            error.cautious() <= MAX_GROUP_RATIO * plain.cautious() && error.total() <= MAX_GROUP_RATIO * plain.total()
        };
        self.groups.iter().zip(&plain.groups).all(spares)
    }

    /// Returns this as a refused regularisation, if it would be better than `chosen` and `plain` forbids it.
    fn refused(&self, chosen: &RegularisedSolution, plain: &RegularisedSolution) -> Option<RefusedRegularisation> {
        let is_better = self.cautious_error() < MAX_REFUSED_RATIO * chosen.cautious_error();
        if !is_better || self.spares_groups(plain) {
            return None;
        }
        let ratio = |group: &usize| self.groups[*group].cautious() / plain.groups[*group].cautious();
        let group = (0..self.groups.len()).max_by(|a, b| ratio(a).total_cmp(&ratio(b)))?;
        Some(RefusedRegularisation { rho: self.rho, expected: self.expected, group })
    }
}

impl ExpectedError {
    /// Returns the error with the factor of the profile's part.
    fn cautious(&self) -> f64 {
        (PROFILE_FACTOR * self.profile).hypot(self.rounding)
    }
}

impl ErrorModel<'_> {
    /// Solves a target with the system's own regularisation, `rho`.
    ///
    /// # Errors
    /// As [`System::solve`](crate::math::System::solve).
    pub(crate) fn solve(&self, profile: &Profile, rho: f64) -> Result<RegularisedSolution> {
        let target = self.system.target(self.updates, profile)?;
        Ok(self.with_expected_error(self.system.blend(self.updates, &target)?, rho))
    }

    /// Solves a target with the regularisation of the smallest expected error; the system's own must be 0.
    ///
    /// No regularisation is used that makes one group much worse to make another better.
    ///
    /// # Errors
    /// As [`System::solve`](crate::math::System::solve), for the solve without a regularisation.
    pub(crate) fn solve_best(&self, profile: &Profile) -> Result<RegularisedSolution> {
        let target = self.system.target(self.updates, profile)?;
        let plain = self.with_expected_error(self.system.blend(self.updates, &target)?, 0.0);
        let norm = self.updates.norm(&target);
        let solve = |power: f64| {
            let rho = norm * 10f64.powf(power);
            // A regularisation that cannot be solved for is skipped.
            let blend = self.system.blend_with(self.updates, &target, rho).ok()?;
            Some(self.with_expected_error(blend, rho))
        };
        let is_any_refused = Cell::new(false);
        let spares = |candidate: &RegularisedSolution| {
            let spares = candidate.spares_groups(&plain);
            is_any_refused.set(is_any_refused.get() || !spares);
            spares
        };
        let best = clear_best(search(|power| solve(power).filter(spares)), &plain);
        let best_of_all = if is_any_refused.get() { clear_best(search(solve), &plain) } else { None };
        let refused = best_of_all.and_then(|other| other.refused(best.as_ref().unwrap_or(&plain), &plain));
        Ok(RegularisedSolution { refused, ..best.unwrap_or(plain) })
    }

    fn with_expected_error(&self, blend: BlendSolution, rho: f64) -> RegularisedSolution {
        let groups = self.expected_errors(&blend);
        let expected = self.expected_over_all(&groups);
        RegularisedSolution { solution: blend.solution, rho, expected, groups, residual: blend.residual, refused: None }
    }
}

/// Tries every power of ten, then twice between the best and its neighbours.
fn search(solve: impl Fn(f64) -> Option<RegularisedSolution>) -> Vec<RegularisedSolution> {
    let solve = |power: f64| solve(power).map(|solution| (power, solution));
    let mut tried: Vec<(f64, RegularisedSolution)> = POWERS.filter_map(|power| solve(f64::from(power))).collect();
    for distance in REFINEMENTS {
        let best = tried.iter().min_by(|a, b| a.1.cautious_error().total_cmp(&b.1.cautious_error()));
        let Some(&(power, _)) = best else { break };
        tried.extend(solve(power - distance));
        tried.extend(solve(power + distance));
    }
    tried.into_iter().map(|(_, solution)| solution).collect()
}

/// Returns the candidate of the smallest `rho` among those near the best. Returns `None` unless the best is clearly
/// better than `plain`.
fn clear_best(candidates: Vec<RegularisedSolution>, plain: &RegularisedSolution) -> Option<RegularisedSolution> {
    let least = candidates.iter().map(RegularisedSolution::cautious_error).fold(f64::INFINITY, f64::min);
    if !(least < MAX_ERROR_RATIO * plain.cautious_error()) {
        return None;
    }
    let near_best = candidates.into_iter().filter(|candidate| candidate.cautious_error() <= NEAR_BEST * least);
    near_best.min_by(|a, b| a.rho.total_cmp(&b.rho))
}
