//! Knots of time, between which variances are linear.

use super::cells::Cells;

/// Returns the weight of each cell at each knot, which sum to 1 over the knots.
///
/// Knots are at the beginning, at the updates `marks`, and at equal parts of the time between them.
pub(super) fn knot_weights(cells: &Cells, marks: &[usize], subdivisions: usize) -> Vec<Vec<f64>> {
    let mut knots = vec![0.0];
    for mark in marks {
        let start = knots[knots.len() - 1];
        let end = (mark + 1) as f64;
        let part = (end - start) / subdivisions as f64;
        knots.extend((1..=subdivisions).map(|i| if i == subdivisions { end } else { start + i as f64 * part }));
    }
    let middles: Vec<f64> = cells.bounds.windows(2).map(|cell| 0.5 * (cell[0] + cell[1] + 1) as f64).collect();
    let weight = |knot: usize, at: f64| {
        let at = at.min(knots[knots.len() - 1]);
        let before = knot.checked_sub(1).map_or(f64::NEG_INFINITY, |before| knots[before]);
        let after = knots.get(knot + 1).copied().unwrap_or(f64::INFINITY);
        if at <= before || at >= after {
            0.0
        } else if at <= knots[knot] {
            if before.is_finite() { (at - before) / (knots[knot] - before) } else { 1.0 }
        } else {
            (after - at) / (after - knots[knot])
        }
    };
    (0..knots.len()).map(|knot| middles.iter().map(|&at| weight(knot, at)).collect()).collect()
}
