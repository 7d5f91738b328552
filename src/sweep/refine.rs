//! Golden-section steps around the best trial, in its own family.

use super::curve::Curve;
use super::points::{GOLDEN, Point, best_points, points, round_length};
use crate::math::{Family, Profile};

/// Relative difference below which two segments count as equal. Segments of an evenly spaced list differ by rounding.
const EVEN: f64 = 1e-6;

/// Returns the next profile to try. Returns `None` if the best trial has no neighbour, or if no length fits between
/// them.
///
/// A failed target of the list does not bound the search: the optimum may be behind it. A failed refinement does, and
/// so does any trial exactly where the next step would go.
pub(super) fn next_profile(curve: Curve<'_>) -> Option<Profile> {
    let (family, _) = curve.best()?.profile.family()?;
    let points = points(curve)?;
    let centre = centre(curve, &points)?;
    let step = |bounds| step_between(curve, family, centre, neighbours(&points, centre, bounds));
    step(|point| point.trial.refined || point.score.is_some()).or_else(|| step(|_| true))
}

/// Returns the profile of the next step around the centre, unless it has a trial already.
fn step_between(
    curve: Curve<'_>,
    family: Family,
    centre: Point<'_>,
    (shorter, longer): (Option<Point<'_>>, Option<Point<'_>>),
) -> Option<Profile> {
    let place = golden_section(curve, shorter, centre, longer)?;
    let is_between = |length: f64| {
        let at = family.coordinate(length);
        shorter.is_none_or(|shorter| shorter.at < at) && longer.is_none_or(|longer| at < longer.at)
    };
    let length = round_length(family.length_at(place), is_between, family.length_at(centre.at));
    let profile = family.profile(length).ok()?;
    curve.get(&profile).is_none().then_some(profile)
}

/// Counts the refinements around the best trial: those between the neighbours, in the list, of its best target. A
/// plateau of equally good trials counts as one.
pub(super) fn steps_around_best(curve: Curve<'_>) -> usize {
    let Some(points) = points(curve) else { return 0 };
    let below = |at: f64| points.iter().rev().find(|point| point.is_listed() && point.at < at);
    let above = |at: f64| points.iter().find(|point| point.is_listed() && point.at > at);
    let equal = best_points(curve, &points);
    let (Some(first), Some(last)) = (equal.first(), equal.last()) else { return 0 };
    let mut from = below(first.at);
    let mut to = above(last.at);
    if !equal.iter().any(Point::is_listed) {
        // The best trial is a refinement, so the better one of its listed neighbours is the best target.
        let is_better = |one: Option<&Point<'_>>, other: Option<&Point<'_>>| {
            one.is_some_and(|one| other.is_none_or(|other| curve.is_better(one.trial, other.trial)))
        };
        let widen_down = !is_better(to, from);
        let widen_up = !is_better(from, to);
        from = if widen_down { from.and_then(|from| below(from.at)) } else { from };
        to = if widen_up { to.and_then(|to| above(to.at)) } else { to };
    }
    let is_between =
        |point: &&Point<'_>| from.is_none_or(|from| from.at < point.at) && to.is_none_or(|to| point.at < to.at);
    points.iter().filter(|point| point.trial.refined).filter(is_between).count()
}

/// Returns the middle one of the best points: the best of a plateau is around its middle.
fn centre<'a>(curve: Curve<'_>, points: &[Point<'a>]) -> Option<Point<'a>> {
    let equal = best_points(curve, points);
    equal.get((equal.len().checked_sub(1)?) / 2).copied()
}

/// Returns the nearest point on each side whose trial bounds the search.
fn neighbours<'a>(
    points: &[Point<'a>],
    centre: Point<'_>,
    bounds: fn(&Point<'_>) -> bool,
) -> (Option<Point<'a>>, Option<Point<'a>>) {
    let shorter = points.iter().rev().find(|point| bounds(point) && point.at < centre.at);
    let longer = points.iter().find(|point| bounds(point) && point.at > centre.at);
    (shorter.copied(), longer.copied())
}

/// Golden section of the longer one of the two segments beside the centre, or of the only one at an end of the list.
///
/// The segments converge to the golden ratio from any start (Press et al., Numerical Recipes, section 10.2).
fn golden_section(
    curve: Curve<'_>,
    shorter: Option<Point<'_>>,
    centre: Point<'_>,
    longer: Option<Point<'_>>,
) -> Option<f64> {
    let towards = |bound: Point<'_>| centre.at + GOLDEN * (bound.at - centre.at);
    match (shorter, longer) {
        (Some(shorter), Some(longer)) => {
            let below = centre.at - shorter.at;
            let above = longer.at - centre.at;
            let is_even = (above - below).abs() <= EVEN * (above + below);
            let up = if is_even { !curve.is_better(shorter.trial, longer.trial) } else { above > below };
            Some(towards(if up { longer } else { shorter }))
        }
        (Some(only), None) | (None, Some(only)) => Some(towards(only)),
        (None, None) => None,
    }
}
