//! Golden-section steps around the best trial, in its own family.

use super::curve::Curve;
use super::points::{GOLDEN, Point, best_points, points, round_length};
use crate::math::{Family, Profile};

/// Nearest shorter and longer point of a centre.
type Bracket<'a> = (Option<Point<'a>>, Option<Point<'a>>);

/// Relative difference below which two segments count as equal. Segments of an evenly spaced list differ by rounding.
const EVEN: f64 = 1e-6;

/// Returns the next profiles to try, at most `count`. Returns none if the best trial has no neighbour, or if no length
/// fits between them.
///
/// One step is a golden section. Several, which are evaluated at a time, cut the segments beside the best trial evenly.
/// A failed target of the list does not bound the search: the optimum may be behind it. A failed refinement does, and
/// so does any trial exactly where the next step would go.
pub(super) fn next_profiles(curve: Curve<'_>, count: usize) -> Vec<Profile> {
    let Some((family, _)) = curve.best().and_then(|best| best.profile.family()) else { return Vec::new() };
    let points = points(curve).unwrap_or_default();
    let Some(centre) = centre(curve, &points) else { return Vec::new() };
    let steps = |bounds| steps_between(curve, family, centre, neighbours(&points, centre, bounds), count);
    let steps_of_successes = steps(|point| point.trial.refined || point.score.is_some());
    if steps_of_successes.is_empty() { steps(|_| true) } else { steps_of_successes }
}

/// Returns the profiles of the next steps around the centre, without those that have a trial already.
fn steps_between(
    curve: Curve<'_>,
    family: Family,
    centre: Point<'_>,
    (shorter, longer): Bracket<'_>,
    count: usize,
) -> Vec<Profile> {
    let places = match count {
        0 => Vec::new(),
        1 => golden_section(curve, shorter, centre, longer).into_iter().collect(),
        _ => even_sections(curve, shorter, centre, longer, count),
    };
    let is_between = |length: f64| {
        let at = family.coordinate(length);
        shorter.is_none_or(|shorter| shorter.at < at) && longer.is_none_or(|longer| at < longer.at)
    };
    let mut profiles: Vec<Profile> = Vec::with_capacity(places.len());
    for place in places {
        let length = round_length(family.length_at(place), is_between, family.length_at(centre.at));
        let profile = family.profile(length).ok().filter(|profile| curve.get(profile).is_none());
        profiles.extend(profile.filter(|profile| !profiles.contains(profile)));
    }
    profiles
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
fn neighbours<'a>(points: &[Point<'a>], centre: Point<'_>, bounds: fn(&Point<'_>) -> bool) -> Bracket<'a> {
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

/// Places that cut the two segments beside the centre into equal pieces, as many of each as leave the least of the
/// whole in the worst case: two pieces of one segment, or one of each around the centre.
fn even_sections(
    curve: Curve<'_>,
    shorter: Option<Point<'_>>,
    centre: Point<'_>,
    longer: Option<Point<'_>>,
    count: usize,
) -> Vec<f64> {
    let length = |bound: Option<Point<'_>>| bound.map_or(0.0, |bound| (bound.at - centre.at).abs());
    let piece = |bound: Option<Point<'_>>, cuts: usize| length(bound) / (cuts + 1) as f64;
    let left = |below: usize| {
        let (short, long) = (piece(shorter, below), piece(longer, count - below));
        let pair = |piece: f64, cuts: usize| if cuts > 0 { 2.0 * piece } else { 0.0 };
        pair(short, below).max(pair(long, count - below)).max(short + long)
    };
    let (fewest, most) = match (shorter, longer) {
        (None, None) => return Vec::new(),
        (None, Some(_)) => (0, 0),
        (Some(_), None) => (count, count),
        (Some(_), Some(_)) => (0, count),
    };
    let least = (fewest..=most).map(left).fold(f64::INFINITY, f64::min);
    let mut equal = (fewest..=most).filter(|below| left(*below) <= (1.0 + EVEN) * least);
    // Prefers the choice with more cuts towards the better neighbour, of two equal ones.
    let up = match (shorter, longer) {
        (Some(shorter), Some(longer)) => !curve.is_better(shorter.trial, longer.trial),
        _ => true,
    };
    let below = if up { equal.next() } else { equal.next_back() }.unwrap_or(fewest);
    let cuts = |bound: Option<Point<'_>>, cuts: usize| {
        let step = bound.map_or(0.0, |bound| (bound.at - centre.at) / (cuts + 1) as f64);
        (1..=cuts).map(move |cut| centre.at + step * cut as f64)
    };
    cuts(shorter, below).chain(cuts(longer, count - below)).collect()
}
