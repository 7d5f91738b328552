//! Trials on the axis of their family.

use super::curve::Curve;
use super::trial::Trial;

/// Smaller part of a golden section: `(3 - sqrt 5) / 2`.
pub(super) const GOLDEN: f64 = 0.381_966_011_250_105_15;

/// Trial at its coordinate on the axis of its family.
#[derive(Clone, Copy)]
pub(super) struct Point<'a> {
    pub at: f64,
    pub trial: &'a Trial,
    pub score: Option<f64>,
}

impl Point<'_> {
    /// Returns true for a successful target of the list.
    pub(super) fn is_listed(&self) -> bool {
        !self.trial.refined && self.score.is_some()
    }
}

/// Returns the trials of the best one's family, sorted by length. Returns `None` for a family without lengths.
pub(super) fn points<'a>(curve: Curve<'a>) -> Option<Vec<Point<'a>>> {
    let (family, _) = curve.best()?.profile.family()?;
    let point =
        |(trial, length): (&'a Trial, f64)| Point { at: family.coordinate(length), trial, score: curve.score(trial) };
    let mut points: Vec<Point<'_>> = curve.of_family(family).map(point).collect();
    points.sort_by(|a, b| a.at.total_cmp(&b.at));
    Some(points)
}

/// Returns the points whose score equals the best one.
pub(super) fn best_points<'a>(curve: Curve<'_>, points: &[Point<'a>]) -> Vec<Point<'a>> {
    let best = curve.best().and_then(|best| curve.score(best));
    points.iter().copied().filter(|point| point.score == best).collect()
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
