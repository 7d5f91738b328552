//! A target on the updates, with what its groups of updates do not show.

use std::ops::Deref;

use super::Updates;
use crate::math::profile::Profile;

/// Smallest change of a group's square, relative to it, at which the group is cut in two.
///
/// Below it the target is as smooth on the group as the sources are, and the errors cancel.
const SMOOTH: f64 = 1e-6;

/// The weights of a target on the updates.
pub(in crate::math) struct TargetWeights {
    weights: Vec<f64>,
    /// Sum over single updates of the squared weights per interval, less that over groups.
    ///
    /// It belongs to the target's square, and to that of every difference from it: sources are smooth on a group. The
    /// start of a window and the infinite slope of a `1-sqrt` decay are not.
    variation: f64,
}

impl Deref for TargetWeights {
    type Target = [f64];

    fn deref(&self) -> &[f64] {
        &self.weights
    }
}

impl TargetWeights {
    pub(super) fn new(updates: &Updates, profile: &Profile, at: u64) -> TargetWeights {
        let mut variation = 0.0;
        // A tracked profile is defined on the groups.
        if !profile.is_trackable() {
            let share = |time: f64| profile.cumulative(time, at as f64);
            let mut from = (0.0, 0.0);
            for (&time, &count) in updates.times.iter().zip(&updates.counts) {
                let to = (time as f64, share(time as f64));
                variation += variation_within(&share, from, to, count);
                from = to;
            }
        }
        TargetWeights { weights: updates.target(profile, at), variation }
    }

    /// Returns the inner product of the target with itself.
    pub(super) fn square(&self, updates: &Updates) -> f64 {
        updates.norm(&self.weights).powi(2) + self.variation
    }

    /// Returns the relative error of a blend of this residual.
    pub(super) fn relative_error(&self, updates: &Updates, residual: &[f64]) -> f64 {
        ((updates.norm(residual).powi(2) + self.variation) / self.square(updates)).sqrt()
    }
}

/// A time and the share up to it.
type Point = (f64, f64);

/// Returns the variation within `count` evenly spaced updates, by halves as long as quarters differ.
///
/// Halves alone may be alike by chance.
fn variation_within(share: &impl Fn(f64) -> f64, from: Point, to: Point, count: f64) -> f64 {
    if count < 2.0 {
        return 0.0;
    }
    let (middle, half) = cut(share, from, to, count);
    let whole = square(from, to);
    let halves = square(from, middle) + square(middle, to);
    let quarters = square_of_halves(share, from, middle, half) + square_of_halves(share, middle, to, count - half);
    if !(quarters - whole > SMOOTH * whole) {
        return 0.0;
    }
    let within = variation_within(share, from, middle, half) + variation_within(share, middle, to, count - half);
    halves - whole + within
}

fn square(from: Point, to: Point) -> f64 {
    (to.1 - from.1).powi(2) / (to.0 - from.0)
}

/// Returns the end of the first half of `count` updates, and its number of updates.
fn cut(share: &impl Fn(f64) -> f64, from: Point, to: Point, count: f64) -> (Point, f64) {
    let half = (count / 2.0).floor();
    let time = from.0 + (to.0 - from.0) * half / count;
    ((time, share(time)), half)
}

fn square_of_halves(share: &impl Fn(f64) -> f64, from: Point, to: Point, count: f64) -> f64 {
    if count < 2.0 {
        return square(from, to);
    }
    let (middle, _) = cut(share, from, to, count);
    square(from, middle) + square(middle, to)
}
