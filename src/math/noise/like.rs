//! Movement that was fitted to one training, expected of another one.
//!
//! Both trainings are put on one clock: the share of each that is over. The smooth movement (walks, lines, swings) is
//! taken to be the same function of this share, as far as the snapshots of the first training show it. The noise of
//! single updates is taken to be as large, and independent.

use std::borrow::Cow;

use faer::Mat;

use super::super::solve::Updates;
use super::measure::Measured;
use super::movement::{Movement, MovementBasis, white_responses};
use super::waves::alternating;

/// Ticks of the common clock in a whole training.
const TICKS: f64 = (1u64 << 50) as f64;

/// Responses of one training's movement at the updates of another.
pub(super) struct LikeBasis<'a> {
    basis: MovementBasis<'static>,
    updates: &'a Updates,
    /// Index of the cell of each update.
    cell_of: Vec<usize>,
    /// Index on the common clock of each update.
    places: Vec<usize>,
    /// Length of the common clock.
    length: usize,
    /// One row per source: responses of its difference from the first source.
    rows: Mat<f64>,
}

impl<'a> LikeBasis<'a> {
    /// Puts the updates of a training of `steps` steps beside those of another one of `other_steps`.
    pub(super) fn new(updates: &'a Updates, steps: u64, other: &Updates, other_steps: u64) -> LikeBasis<'a> {
        let (times, places, other_places) = merged(&ticks(&updates.times, steps), &ticks(&other.times, other_steps));
        let placed = updates.placed(&times, &places);
        let basis = MovementBasis::new(Cow::Owned(other.placed(&times, &other_places)), &placed.marks);
        let cell_of =
            places.iter().map(|place| basis.cells.bounds.partition_point(|bound| bound <= place) - 1).collect();
        let rows = source_rows(&basis, &placed);
        LikeBasis { basis, updates, cell_of, places, length: times.len(), rows }
    }

    pub(super) fn fit(&self, measured: &Measured) -> Movement {
        self.basis.fit(measured)
    }

    /// Returns the mean square of a blend of the parameters, with weights on the updates whose sum is 0.
    pub(super) fn mean_square(&self, movement: &Movement, weights: &[f64]) -> f64 {
        let mut placed = vec![0.0; self.length];
        self.places.iter().zip(weights).for_each(|(&place, weight)| placed[place] = *weight);
        let mut responses = self.basis.responses(&self.basis.cells.sums(&placed), 0.0);
        // Noise of single updates is independent of that of the other training.
        responses[..self.basis.cells.len()].fill(0.0);
        let white =
            |(k, weight): (usize, &f64)| movement.variances[self.cell_of[k]] * weight * weight / self.updates.counts[k];
        let alternation = movement.variances.last().copied().unwrap_or_default();
        self.basis.given_snapshots(movement, &responses)
            + weights.iter().enumerate().map(white).sum::<f64>()
            + alternation * alternating(self.updates, weights).powi(2)
    }

    /// Returns the mean square movement between each pair of sources.
    pub(super) fn distances(&self, movement: &Movement) -> Mat<f64> {
        let products = self.basis.products_given_snapshots(movement, &self.rows);
        let distance = |i: usize, j: usize| products[(i, i)] + products[(j, j)] - products[(i, j)] - products[(j, i)];
        Mat::from_fn(products.nrows(), products.nrows(), |i, j| distance(i, j).max(0.0))
    }
}

/// Returns the responses of each source's difference from the first.
fn source_rows(basis: &MovementBasis<'_>, placed: &Updates) -> Mat<f64> {
    let cells = &basis.cells;
    let counts = cells.sums(&placed.counts);
    let shares: Vec<Vec<Vec<f64>>> = placed.decays.iter().map(|decays| cells.shares(decays, &placed.marks)).collect();
    let of = |&(chain, mark): &(usize, usize)| &shares[chain][mark];
    let row = |source: &(usize, usize)| {
        let difference: Vec<f64> = of(source).iter().zip(of(&placed.sources[0])).map(|(a, b)| a - b).collect();
        let mut responses = basis.responses(&difference, 0.0);
        responses[..cells.len()].copy_from_slice(&white_responses(&difference, &counts));
        responses
    };
    let rows: Vec<Vec<f64>> = placed.sources.iter().map(row).collect();
    Mat::from_fn(rows.len(), rows.first().map_or(0, Vec::len), |i, j| rows[i][j])
}

/// Returns times in ticks of the common clock.
fn ticks(times: &[u64], steps: u64) -> Vec<u64> {
    times.iter().map(|&time| (time as f64 / steps as f64 * TICKS).round() as u64).collect()
}

/// Merges increasing times; returns all, and the places of each list among them.
fn merged(a: &[u64], b: &[u64]) -> (Vec<u64>, Vec<usize>, Vec<usize>) {
    let mut all = Vec::with_capacity(a.len() + b.len());
    let (mut of_a, mut of_b) = (Vec::with_capacity(a.len()), Vec::with_capacity(b.len()));
    while of_a.len() < a.len() || of_b.len() < b.len() {
        let (next_a, next_b) = (a.get(of_a.len()), b.get(of_b.len()));
        let takes_a = next_b.is_none_or(|b| next_a.is_some_and(|a| a <= b));
        let (next, places) = if takes_a { (next_a, &mut of_a) } else { (next_b, &mut of_b) };
        places.push(all.len());
        all.extend(next);
    }
    (all, of_a, of_b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_times_keep_both_orders() {
        let (all, a, b) = merged(&[1, 5, 9], &[0, 5, 6]);
        assert_eq!((all, a, b), (vec![0, 1, 5, 5, 6, 9], vec![1, 2, 5], vec![0, 3, 4]));
        assert_eq!(merged(&[], &[2]), (vec![2], vec![], vec![0]));
    }
}
