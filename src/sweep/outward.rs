//! Steps beyond the edge of a list, if the best trial is there.

use super::curve::Curve;
use super::points::{GOLDEN, Point, best_points, points, round_length};
use crate::math::{Family, MAX_SIGMA_REL, Profile, Unit};

/// Factor by which steps grow: with it, the first bracket has golden proportions.
const GROWTH: f64 = (1.0 - GOLDEN) / GOLDEN;

/// Number of halvings that look for the last length within reach.
const HALVINGS: usize = 6;

/// Smallest step to the end of the reach, as a share of the list's mean interval.
const SMALLEST: f64 = 0.25;

/// Returns the next profiles beyond the edge, at most `count`: each is where the search would go if the one before it
/// were the best. Returns none if the best trial is at no edge, if a trial is beyond it, or if nothing worth a trial is
/// within reach.
pub(super) fn next_profiles(curve: Curve<'_>, count: usize, is_reached: &dyn Fn(&Profile) -> bool) -> Vec<Profile> {
    steps(curve, count, is_reached).unwrap_or_default()
}

fn steps(curve: Curve<'_>, count: usize, is_reached: &dyn Fn(&Profile) -> bool) -> Option<Vec<Profile>> {
    let (family, _) = curve.best()?.profile.family()?;
    let points = points(curve)?;
    let best = best_points(curve, &points);
    let (first, last) = (points.first()?, points.last()?);
    let interval = mean_interval(&points)?;
    let steps_from = |edge: &Point<'_>, up: bool| {
        let inner = points.iter().filter(|point| point.score.is_some() && point.at != edge.at);
        let gap = inner.map(|point| (point.at - edge.at).abs()).reduce(f64::min)?.max(interval);
        let (mut edge, mut gap) = (edge.at, if up { gap } else { -gap });
        let mut profiles = Vec::new();
        while profiles.len() < count {
            let Some(profile) = step(family, edge, gap, SMALLEST * interval, is_reached) else { break };
            let at = family.coordinate(profile.family()?.1);
            (gap, edge) = ((at - edge).abs().max(interval).copysign(gap), at);
            profiles.push(profile);
        }
        Some(profiles).filter(|profiles| !profiles.is_empty())
    };
    let at_end = |end: &Point<'_>| best.iter().any(|point| point.at == end.at);
    let shorter = if at_end(first) { steps_from(first, false) } else { None };
    shorter.or_else(|| if at_end(last) { steps_from(last, true) } else { None })
}

/// Returns the mean interval of the list. Returns `None` for fewer than two targets.
fn mean_interval(points: &[Point<'_>]) -> Option<f64> {
    let mut listed = points.iter().filter(|point| !point.trial.refined);
    let first = listed.next()?.at;
    let (last, intervals) = listed.fold((first, 0), |(_, count), point| (point.at, count + 1));
    if intervals == 0 { None } else { Some((last - first) / f64::from(intervals)) }
}

/// Returns the profile a step beyond an edge, or the last one within reach.
fn step(family: Family, edge: f64, gap: f64, smallest: f64, is_reached: &dyn Fn(&Profile) -> bool) -> Option<Profile> {
    let mut far = edge + GROWTH * gap;
    if family == Family::Power {
        // A length is above 0, and below the plain mean's.
        far = far.max(GOLDEN * edge);
    }
    far = far.min(family.coordinate(longest(family)));
    let profile_at = |at: f64| {
        let is_beyond = |length: f64| {
            let place = family.coordinate(length);
            (place - edge) * gap > 0.0 && length <= longest(family)
        };
        let length = round_length(family.length_at(at), is_beyond, family.length_at(edge));
        family.profile(length).ok().filter(is_reached)
    };
    if (far - edge).abs() < smallest {
        return None;
    }
    if let Some(profile) = profile_at(far) {
        return Some(profile);
    }
    // A list may go beyond the reach, where a further step is worse still.
    profile_at(edge)?;
    let (mut near, mut found) = (edge, None);
    for _ in 0..HALVINGS {
        let middle = 0.5 * (near + far);
        match profile_at(middle) {
            Some(profile) => (near, found) = (middle, Some(profile)),
            None => far = middle,
        }
    }
    found.filter(|_| (near - edge).abs() >= smallest)
}

/// Length that no profile of a family exceeds.
pub(super) fn longest(family: Family) -> f64 {
    match family {
        Family::Power => MAX_SIGMA_REL,
        Family::Uniform(Unit::Fraction) | Family::Linear(Unit::Fraction) | Family::LrDecay(_, Unit::Fraction) => 1.0,
        _ => f64::INFINITY,
    }
}
