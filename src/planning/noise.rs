//! The regularisation of a solve against the rounding of stored snapshots, and predicted errors.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::error::{Error, Result};

/// Regularisation of a solve against the rounding of stored snapshots, which a blend amplifies by its noise gain.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Noise {
    /// No regularisation: the blend's profile is as close to the target as possible.
    #[default]
    Off,
    /// The regularisation of the smallest predicted error, chosen for each target.
    ///
    /// It is used only if it lowers the predicted error by at least two fifths, and never if no error can be predicted
    /// ([`Plan::predicted`](super::Plan::predicted)). No group of tensors may become worse by more than 5%.
    Auto,
    /// A given regularisation `rho`, in the units of the profiles' norm (1/sqrt steps): `rho^2 ||x||^2` is added to the
    /// squared distance of the profiles.
    Rho(f64),
}

impl Noise {
    /// Returns the regularisation shared by all targets; 0 for [`Noise::Auto`], which chooses one for each.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a `rho` that is negative, NaN, or has no finite square.
    pub(crate) fn rho(self) -> Result<f64> {
        match self {
            Noise::Off | Noise::Auto => Ok(0.0),
            Noise::Rho(rho) if rho >= 0.0 && (rho * rho).is_finite() => Ok(rho),
            Noise::Rho(value) => {
                let allowed = "a regularisation must be 0 or more and finite; 0 is none".into();
                Err(Error::Parameter { name: "rho", value, allowed })
            }
        }
    }
}

/// Writes the form that [`FromStr`] parses.
impl fmt::Display for Noise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Noise::Off => f.write_str("off"),
            Noise::Auto => f.write_str("auto"),
            Noise::Rho(rho) => write!(f, "{rho}"),
        }
    }
}

impl FromStr for Noise {
    type Err = String;

    fn from_str(text: &str) -> Result<Noise, String> {
        let noise = match text {
            "off" => Noise::Off,
            "auto" => Noise::Auto,
            _ => text.parse().map(Noise::Rho).map_err(|_| format!("`{text}` is not off, auto or a number"))?,
        };
        noise.rho().map(|_| noise).map_err(|error| error.to_string())
    }
}

/// Expected error of an average: root mean squares over the elements of all tensors.
///
/// It is relative to the root mean square of the weights in the newest snapshot at the time of the target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PredictedError {
    /// Error due to the difference of the blend's profile from the target's.
    pub profile: f64,
    /// Error due to the rounding of stored snapshots.
    pub rounding: f64,
    /// Both errors combined: `hypot(profile, rounding)`.
    pub total: f64,
}

/// Event between two snapshots that makes the most of a predicted error.
///
/// It is a jump, a spike or a fast start.
///
/// Snapshots show its size and not its time, so the error is known to a range only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MovementEvent {
    /// Step of the snapshot before the event; 0 for the beginning.
    pub after: u64,
    /// Step of the snapshot after it.
    pub before: u64,
    /// Smallest error of the average, in the units of [`PredictedError::total`].
    pub least: f64,
    /// Largest error of the average.
    pub most: f64,
}

/// Says in a sentence how far the error is known.
impl fmt::Display for MovementEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MovementEvent { after, before, least, most } = self;
        write!(
            f,
            "one event between steps {after} and {before} (a jump, a spike, a fast start) makes the most of the \
             predicted error, which can be {least:.1e} to {most:.1e} by when it was"
        )
    }
}

/// The group of tensors of the largest predicted error, relative to its own weights.
///
/// Tensors that move by similar shares of their weights are one group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WorstGroup {
    /// Names of the tensors, in the order of the run.
    pub tensors: Vec<String>,
    /// The group's share of all averaged elements.
    pub share: f64,
    /// The expected error of the group, relative to the root mean square of its own weights.
    pub predicted: PredictedError,
}

/// Regularisation that [`Noise::Auto`] does not use, because it would make a group of tensors worse by more than 5%.
///
/// The whole would have a clearly smaller error with it: [`Noise::Rho`] uses it all the same.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeldBack {
    /// Names of the tensors that would be worse, in the order of the run.
    pub tensors: Vec<String>,
    /// The regularisation, as [`Plan::rho`](super::Plan::rho).
    pub rho: f64,
    /// The expected error of all elements with it.
    pub predicted: PredictedError,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_accepts_off_auto_and_finite_numbers_from_zero() {
        for rho in [-1e-9, f64::NAN, f64::INFINITY, 1e300] {
            let text = Noise::Rho(rho).rho().unwrap_err().to_string();
            assert!(text.contains("rho") && text.contains("0 or more"), "{text}");
        }
        assert_eq!(Noise::Rho(0.5).rho().unwrap(), 0.5);
        assert_eq!("0.5".parse(), Ok(Noise::Rho(0.5)));
        assert_eq!(("off".parse(), "auto".parse()), (Ok(Noise::Off), Ok(Noise::Auto)));
        for text in ["", "on", "-1", "NaN", "inf"] {
            assert!(text.parse::<Noise>().is_err(), "{text}");
        }
        assert_eq!(Noise::Auto.rho().unwrap(), 0.0);
    }
}
