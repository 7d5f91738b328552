//! The regularisation of one target.

use super::super::profile::Profile;
use super::super::solve::{Blend, Solution};
use super::{Expected, Model};
use crate::error::Result;

/// A regularisation is worth it only where it is expected to take two fifths off the error. The model is one: movement that comes
/// and goes between two snapshots is not seen in them, and a smaller gain could be none.
const CLEAR: f64 = 0.6;

/// The choice counts the profile's part of the error double: of the two, it is the one that a trajectory unlike the model's
/// would get wrong, and near the best regularisation this costs little.
const CAUTION: f64 = 2.0;

/// Of what is about as good as the best, the weakest is taken.
const ABOUT: f64 = 1.02;

/// Powers of ten of `rho`, in units of the target's norm: at the one end nothing is changed, at the other all weights
/// become alike.
const COARSE: std::ops::RangeInclusive<i32> = -7..=1;

/// A solution with the regularisation that it was made with.
pub(crate) struct Choice {
    pub solution: Solution,
    pub rho: f64,
    pub expected: Expected,
}

impl Choice {
    fn cautious(&self) -> f64 {
        (CAUTION * self.expected.profile).hypot(self.expected.rounding)
    }
}

impl Model<'_> {
    /// The weights of a target by the system's own regularisation, `rho`.
    ///
    /// # Errors
    /// Those of the solve.
    pub(crate) fn given(&self, profile: &Profile, rho: f64) -> Result<Choice> {
        let target = self.system.target(self.updates, profile)?;
        Ok(self.choice(self.system.blend(self.updates, &target)?, rho))
    }

    /// The weights of a target of which the smallest error is expected; the system's own regularisation must be 0.
    ///
    /// # Errors
    /// Those of the solve without any regularisation.
    pub(crate) fn best(&self, profile: &Profile) -> Result<Choice> {
        let target = self.system.target(self.updates, profile)?;
        let plain = self.choice(self.system.blend(self.updates, &target)?, 0.0);
        let unit = self.updates.norm(&target);
        let at = |power: f64| {
            let rho = unit * 10f64.powf(power);
            // What cannot be solved is no candidate.
            self.system.blend_with(self.updates, &target, rho).ok().map(|blend| self.choice(blend, rho))
        };
        Ok(weakest(search(at), plain))
    }

    fn choice(&self, blend: Blend, rho: f64) -> Choice {
        let expected = self.expect(&blend);
        Choice { solution: blend.solution, rho, expected }
    }
}

/// Every power of ten, and twice between the best and its neighbours.
fn search(at: impl Fn(f64) -> Option<Choice>) -> Vec<Choice> {
    let mut tried: Vec<(f64, Choice)> = Vec::new();
    let attempt = |tried: &mut Vec<(f64, Choice)>, power: f64| tried.extend(at(power).map(|choice| (power, choice)));
    COARSE.for_each(|power| attempt(&mut tried, f64::from(power)));
    for step in [0.5, 0.25] {
        let least = tried.iter().min_by(|a, b| a.1.cautious().total_cmp(&b.1.cautious()));
        let Some(&(power, _)) = least else { break };
        attempt(&mut tried, power - step);
        attempt(&mut tried, power + step);
    }
    tried.into_iter().map(|(_, choice)| choice).collect()
}

/// The candidate with the smallest `rho` among those about as good as the best; `plain` unless that is clearly worse.
fn weakest(candidates: Vec<Choice>, plain: Choice) -> Choice {
    let least = candidates.iter().map(|choice| choice.cautious()).fold(f64::INFINITY, f64::min);
    if !(least < CLEAR * plain.cautious()) {
        return plain;
    }
    let good = candidates.into_iter().filter(|choice| choice.cautious() <= ABOUT * least);
    good.min_by(|a, b| a.rho.total_cmp(&b.rho)).unwrap_or(plain)
}
