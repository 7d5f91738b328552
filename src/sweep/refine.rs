//! Golden-section steps around the best trial, in the best's own family.

use super::search::{Sweep, Trial};
use crate::math::Profile;

/// The smaller part of a golden section: `(3 - sqrt 5) / 2`.
const GOLDEN: f64 = 0.381_966_011_250_105_15;

/// Segments that differ by less than this share are of one length: evenly spaced lists are so but for rounding.
const EVEN: f64 = 1e-6;

/// A trial on the axis of its family.
#[derive(Clone, Copy)]
struct Point<'a> {
    at: f64,
    trial: &'a Trial,
}

/// The next profile to try; none where the best has no neighbour, or none lies between them.
///
/// A failed target of the list does not bound the search, which would stop short of the optimum behind it. A failed
/// refinement does, and so does any trial that stands exactly where the next step would go.
pub(super) fn next(sweep: &Sweep) -> Option<Profile> {
    let (family, _) = sweep.best()?.profile.family()?;
    let points = points(sweep)?;
    let centre = centre(sweep, &points)?;
    let untried = |bounds: fn(&Trial) -> bool| {
        let (shorter, longer) = neighbours(&points, centre, bounds);
        let place = step(sweep, shorter, centre, longer)?;
        let length = readable(
            family.length_at(place),
            |length| {
                let at = family.coordinate(length);
                shorter.is_none_or(|shorter| shorter.at < at) && longer.is_none_or(|longer| at < longer.at)
            },
            family.length_at(centre.at),
        );
        let profile = family.profile(length).ok()?;
        sweep.trial(&profile).is_none().then_some(profile)
    };
    untried(|trial| trial.refined || trial.score().is_some()).or_else(|| untried(|_| true))
}

/// How many steps were made around the best: between the neighbours in the list of the best of the list, or of all that
/// are as good.
pub(super) fn made(sweep: &Sweep) -> usize {
    let Some(points) = points(sweep) else { return 0 };
    let best = sweep.best().and_then(Trial::score);
    let listed = |point: &&Point<'_>| !point.trial.refined && point.trial.score().is_some();
    let below = |at: f64| points.iter().rev().filter(listed).find(|point| point.at < at);
    let above = |at: f64| points.iter().filter(listed).find(|point| point.at > at);
    let equal: Vec<&Point<'_>> = points.iter().filter(|point| point.trial.score() == best).collect();
    let (Some(first), Some(last)) = (equal.first(), equal.last()) else { return 0 };
    let (mut from, mut to) = (below(first.at), above(last.at));
    if !equal.iter().any(listed) {
        // A step is the best: the better one beside it is the best of the list.
        let better = |one: Option<&Point<'_>>, other: Option<&Point<'_>>| {
            one.is_some_and(|one| other.is_none_or(|other| sweep.is_better(one.trial, other.trial)))
        };
        let (widen_down, widen_up) = (!better(to, from), !better(from, to));
        from = if widen_down { from.and_then(|from| below(from.at)) } else { from };
        to = if widen_up { to.and_then(|to| above(to.at)) } else { to };
    }
    let within =
        |point: &&Point<'_>| from.is_none_or(|from| from.at < point.at) && to.is_none_or(|to| point.at < to.at);
    points.iter().filter(|point| point.trial.refined).filter(within).count()
}

/// The trials of the best's family, in order of their length; none where it has no length.
fn points(sweep: &Sweep) -> Option<Vec<Point<'_>>> {
    let (family, _) = sweep.best()?.profile.family()?;
    let point = |(trial, length)| Point { at: family.coordinate(length), trial };
    let mut points: Vec<Point<'_>> = sweep.of_family(family).map(point).collect();
    points.sort_by(|a, b| a.at.total_cmp(&b.at));
    Some(points)
}

/// Of the points that are as good as the best, the one in the middle: around it lies what is best on a plateau.
fn centre<'a>(sweep: &Sweep, points: &[Point<'a>]) -> Option<Point<'a>> {
    let best = sweep.best()?.score();
    let equal: Vec<Point<'a>> = points.iter().copied().filter(|point| point.trial.score() == best).collect();
    equal.get((equal.len().checked_sub(1)?) / 2).copied()
}

/// The nearest points on both sides that bound the search.
fn neighbours<'a>(
    points: &[Point<'a>],
    centre: Point<'_>,
    bounds: fn(&Trial) -> bool,
) -> (Option<Point<'a>>, Option<Point<'a>>) {
    let bounds = |point: &&Point<'a>| bounds(point.trial);
    let shorter = points.iter().rev().filter(bounds).find(|point| point.at < centre.at);
    let longer = points.iter().filter(bounds).find(|point| point.at > centre.at);
    (shorter.copied(), longer.copied())
}

/// The golden section of the longer of the two segments beside the centre; at the end of the list, of the only one.
///
/// Press et al., Numerical Recipes, section 10.2: whatever the segments were, they come to the golden ratio.
fn step(sweep: &Sweep, shorter: Option<Point<'_>>, centre: Point<'_>, longer: Option<Point<'_>>) -> Option<f64> {
    let into = |bound: Point<'_>| centre.at + GOLDEN * (bound.at - centre.at);
    match (shorter, longer) {
        (Some(shorter), Some(longer)) => {
            let (below, above) = (centre.at - shorter.at, longer.at - centre.at);
            let even = (above - below).abs() <= EVEN * (above + below);
            let up = if even { !sweep.is_better(shorter.trial, longer.trial) } else { above > below };
            Some(into(if up { longer } else { shorter }))
        }
        (Some(only), None) | (None, Some(only)) => Some(into(only)),
        (None, None) => None,
    }
}

/// A length without the digits that do not matter: to a thousandth of its distance from the centre, where it then
/// still lies between its neighbours.
fn readable(length: f64, within: impl Fn(f64) -> bool, centre: f64) -> f64 {
    let digit = 10f64.powf((length - centre).abs().log10().floor() - 3.0);
    // Decimal digits by way of text: a multiple of 0.001 computed as a product has digits of its own.
    let digits = (-digit.log10().round()).clamp(0.0, 17.0) as usize;
    let rounded = if digit < 1.0 {
        format!("{length:.digits$}").parse().unwrap_or(length)
    } else {
        (length / digit).round() * digit
    };
    if within(rounded) && rounded != centre { rounded } else { length }
}
