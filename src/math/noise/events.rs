//! Single events between two snapshots: a jump, a spike of few updates, or a fast start.
//!
//! Snapshots show how far an event moved the parameters, and not when. A blend responds to it by its weight on the
//! updates from then on, so the error is known to a range only.

use std::collections::BTreeSet;
use std::ops::Range;

use super::movement::{Movement, MovementBasis};

/// Least ratio of the variance between two snapshots to those before and after, from which it is an event.
///
/// Variances that rise or fall with the learning rate are not events: they are larger on one side.
const FACTOR: f64 = 10.0;

/// Number of intervals on each side that an event is compared with.
const SIDE: usize = 2;

/// Share of the mean square error from which an event makes it uncertain.
const SHARE: f64 = 0.5;

/// Mean squares of a blend between which the error lies, if one event makes most of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct EventRange {
    /// Times of the snapshots around the event, or around the largest of several.
    pub between: (u64, u64),
    pub least: f64,
    pub most: f64,
}

impl MovementBasis<'_> {
    /// Returns the range of the mean square of a blend; `None` if events are not the most of it.
    ///
    /// `weights` are those on the updates, and `mean_square` the expectation.
    pub(super) fn event_range(&self, movement: &Movement, weights: &[f64], mean_square: f64) -> Option<EventRange> {
        let cells = self.cells.len();
        let responses = self.responses(&self.cells.sums(weights), 0.0);
        let mut others = responses.clone();
        let mut between = (0, 0);
        // The errors by all events together, and by the largest one.
        let (mut sum, mut largest, mut least_of_largest) = (0.0, 0.0, 0.0f64);
        let mut events = BTreeSet::new();
        let intervals = self.intervals();
        // Noise of single updates, and steps of a walk. The units of a cell are its updates, or its time.
        for (kind, units) in [&self.cells.counts, &self.cells.spans].into_iter().enumerate() {
            let variance = |c: usize| movement.variances[kind * cells + c];
            let moved = |interval: &Range<usize>| interval.clone().map(|c| variance(c) * units[c]).sum();
            let moved: Vec<f64> = intervals.iter().map(moved).collect();
            for (i, interval) in intervals.iter().enumerate().filter(|(i, _)| is_event(&moved, *i)) {
                others[kind * cells..][interval.clone()].fill(0.0);
                let response = |c: usize| responses[kind * cells + c] / units[c].sqrt();
                let all = interval.clone().filter(|&c| units[c] > 0.0).map(response);
                let (low, high) = all.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (x.min(a), x.max(b)));
                let size = moved[i].sqrt();
                // A response that changes its sign is 0 in between.
                let least = size * low.max(-high).max(0.0);
                let most = size * high.max(-low);
                sum += most;
                events.insert(i);
                if most > largest {
                    (largest, least_of_largest) = (most, least);
                    between = self.times_around(i);
                }
            }
        }
        let others = self.given_snapshots(movement, &others);
        // Several events may add up, or cancel.
        let least = if events.len() > 1 { 0.0 } else { least_of_largest.powi(2) + others };
        let range = EventRange { between, least, most: sum * sum + others };
        (largest > 0.0 && others < (1.0 - SHARE) * mean_square).then_some(range)
    }
}

/// Returns true if movement in one interval stands out from those on both sides.
fn is_event(moved: &[f64], i: usize) -> bool {
    let stands_out = |others: &[f64]| others.iter().any(|other| moved[i] > FACTOR * other);
    let before = &moved[i.saturating_sub(SIDE)..i];
    let after = &moved[i + 1..moved.len().min(i + 1 + SIDE)];
    // The first interval has nothing before it, and the last one nothing after it.
    moved.len() > 1 && (before.is_empty() || stands_out(before)) && (after.is_empty() || stands_out(after))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [usize; 0] = [];

    #[test]
    fn event_stands_out_on_both_sides() {
        let events = |moved: &[f64]| (0..moved.len()).filter(|&i| is_event(moved, i)).collect::<Vec<_>>();
        assert_eq!(events(&[1.0, 1.0, 1.0, 1.0]), NONE);
        assert_eq!(events(&[1.0, 1.0, 40.0, 1.0, 1.0]), [2]);
        assert_eq!(events(&[1.0, 1.0, 40.0, 30.0, 1.0, 1.0]), [2, 3]);
        assert_eq!(events(&[1.0, 1.0, 1.0, 40.0]), [3]);
        assert_eq!(events(&[1e6, 1e4, 1e2, 1.0]), [0], "fast start");
        assert_eq!(events(&[6.0, 3.0, 1.0, 0.5]), NONE, "convergence");
        assert_eq!(events(&[1.0, 3.0, 9.0, 12.0]), NONE, "warm-up");
        assert_eq!(events(&[9.0]), NONE);
    }
}
