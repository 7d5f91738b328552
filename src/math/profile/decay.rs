//! The decay of an exponential profile.

use std::f64::consts::LN_2;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::short;
use crate::error::{Error, Result};
use crate::math::conversion::half_life_to_beta;

/// Half-life of raw weights in steps: a decay of 2^-128 per step, so that `1 - beta` is 1.
pub(super) const RAW: f64 = 1.0 / 128.0;

/// Decay of an exponential profile, in the unit in which it was given.
///
/// Each keeps its own digits: the decay per step of a half-life of 1e18 steps differs from 1 by less than an f64 holds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Decay {
    /// The decay per step.
    Beta(f64),
    /// The number of steps that halve a weight.
    HalfLife(f64),
}

/// Compares values of one unit. A decay per step equals each half-life that rounds to it.
///
/// A run of an older version stored a half-life as its decay per step, and is resumed by the same option.
impl PartialEq for Decay {
    fn eq(&self, other: &Decay) -> bool {
        match (self, other) {
            (Decay::HalfLife(a), Decay::HalfLife(b)) => a == b,
            _ => self.beta() == other.beta(),
        }
    }
}

impl Decay {
    /// Returns the decay per step, rounded to 1 for the longest half-lives.
    pub(super) fn beta(self) -> f64 {
        match self {
            Decay::Beta(beta) => beta,
            Decay::HalfLife(steps) => half_life_to_beta(steps),
        }
    }

    pub(super) fn half_life(self) -> f64 {
        match self {
            Decay::Beta(beta) => -LN_2 / beta.ln(),
            Decay::HalfLife(steps) => steps,
        }
    }

    /// Returns the logarithm of the decay over a number of steps.
    pub(super) fn ln_over(self, steps: f64) -> f64 {
        match self {
            Decay::Beta(beta) => beta.ln() * steps,
            Decay::HalfLife(half_life) => -LN_2 * (steps / half_life),
        }
    }

    pub(super) fn check(self) -> Result<()> {
        match self {
            Decay::Beta(beta) if !(beta > 0.0 && beta < 1.0) => Err(Error::Parameter {
                name: "beta",
                value: beta,
                allowed: "a decay per step must be above 0 and below 1".into(),
            }),
            Decay::HalfLife(steps) if !(steps.is_finite() && steps > 0.0 && self.beta() > 0.0) => {
                let allowed = "a half-life in steps must be above 0 and finite, with a decay 2^(-1/h) above 0".into();
                Err(Error::Parameter { name: "half_life", value: steps, allowed })
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Decay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decay::Beta(beta) => write!(f, "beta {beta}"),
            Decay::HalfLife(RAW) => f.write_str("raw weights"),
            Decay::HalfLife(steps) => write!(f, "half_life {}", short(*steps)),
        }
    }
}
