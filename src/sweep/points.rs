//! Trials on the axis of their family.

use super::trial::{Trial, Trials};

/// Smaller part of a golden section: `(3 - sqrt 5) / 2`.
pub(super) const GOLDEN: f64 = 0.381_966_011_250_105_15;

/// Trial at its coordinate on the axis of its family.
#[derive(Clone, Copy)]
pub(super) struct Point<'a> {
    pub at: f64,
    pub trial: &'a Trial,
}

impl Point<'_> {
    /// Returns true for a successful target of the list.
    pub(super) fn is_listed(&self) -> bool {
        !self.trial.refined && self.trial.score().is_some()
    }
}

/// Returns the trials of the best one's family, sorted by length. Returns `None` for a family without lengths.
pub(super) fn points(trials: &Trials) -> Option<Vec<Point<'_>>> {
    let (family, _) = trials.best()?.profile.family()?;
    let trials = trials.of_family(family);
    let mut points: Vec<Point<'_>> =
        trials.map(|(trial, length)| Point { at: family.coordinate(length), trial }).collect();
    points.sort_by(|a, b| a.at.total_cmp(&b.at));
    Some(points)
}

/// Returns the points whose score equals the best one.
pub(super) fn best_points<'a>(trials: &Trials, points: &[Point<'a>]) -> Vec<Point<'a>> {
    let best = trials.best().and_then(Trial::score);
    points.iter().copied().filter(|point| point.trial.score() == best).collect()
}

/// Rounds a length to a thousandth of its distance from the centre, if the result is still between its neighbours.
pub(super) fn round_length(length: f64, is_between: impl Fn(f64) -> bool, centre: f64) -> f64 {
    let digit = 10f64.powf((length - centre).abs().log10().floor() - 3.0);
    // Rounds by way of text: a product with 0.001 would have binary digits of its own.
    let digits = (-digit.log10().round()).clamp(0.0, 17.0) as usize;
    let rounded = if digit < 1.0 {
        format!("{length:.digits$}").parse().unwrap_or(length)
    } else {
        (length / digit).round() * digit
    };
    if is_between(rounded) && rounded != centre { rounded } else { length }
}
