//! Windows of profiles of finite length, and the shapes of learning-rate decay over them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::short;
use crate::error::{Error, Result};

/// Length of a profile that ends within a finite time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Window {
    /// A number of steps.
    #[serde(rename = "window")]
    Steps(f64),
    /// A share of the target time, in (0, 1].
    #[serde(rename = "fraction")]
    Fraction(f64),
}

/// Schedule of a learning rate that falls from 1 to 0 over the window, at the share `u` of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// `1 - u`.
    Linear,
    /// `(1 + cos(pi u)) / 2`.
    Cosine,
    /// `1 - sqrt(u)`.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

impl Window {
    /// Returns the length in steps.
    pub(super) fn steps(self, at: f64) -> f64 {
        match self {
            Window::Steps(steps) => steps,
            Window::Fraction(fraction) => fraction * at,
        }
    }

    /// Returns the share of the window that has passed at `tau`, in [0, 1].
    pub(super) fn elapsed(self, tau: f64, at: f64) -> f64 {
        let steps = self.steps(at);
        ((tau - (at - steps)) / steps).clamp(0.0, 1.0)
    }

    pub(super) fn check(self) -> Result<()> {
        let (value, most, allowed) = match self {
            Window::Steps(steps) => (steps, f64::MAX, "a window in steps must be above 0"),
            Window::Fraction(fraction) => (fraction, 1.0, "a window as a fraction must be above 0 and at most 1"),
        };
        if value > 0.0 && value <= most {
            return Ok(());
        }
        Err(Error::Parameter { name: "window", value, allowed: allowed.into() })
    }
}

impl Shape {
    /// Returns the learning rate at the share `u` of the window.
    pub(super) fn factor(self, u: f64) -> f64 {
        match self {
            Shape::Linear => 1.0 - u,
            Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * u).cos()),
            Shape::OneMinusSqrt => 1.0 - u.sqrt(),
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Window::Steps(steps) => write!(f, "{steps}"),
            Window::Fraction(fraction) => write!(f, "{}%", short(100.0 * fraction)),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Shape::Linear => "linear",
            Shape::Cosine => "cosine",
            Shape::OneMinusSqrt => "1-sqrt",
        })
    }
}
