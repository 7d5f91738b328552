//! Cells of updates, on which the movement of parameters is modelled.

use super::super::chain::Decays;
use super::super::solve::Updates;

/// Equal parts of the time between two snapshots.
const PARTS: usize = 16;

/// Halvings of the last part, because short averages change fast at the newest snapshot.
const HALVINGS: i32 = 4;

/// Runs of updates between the snapshots. The first update is a cell of its own.
pub(super) struct Cells {
    /// Indices of the first update of each cell, and the number of updates at the end.
    pub bounds: Vec<usize>,
    /// Number of updates of each cell.
    pub counts: Vec<f64>,
    /// Steps from the last update of the previous cell to the cell's own last update.
    pub spans: Vec<f64>,
    /// Mean time of each cell, in steps.
    pub times: Vec<f64>,
}

impl Cells {
    /// Cuts the updates at `marks`, the indices of updates with a snapshot, and each piece into parts.
    pub(super) fn new(updates: &Updates, marks: &[usize]) -> Cells {
        let total = updates.times.len();
        let mut bounds = vec![0, 1];
        for end in marks.iter().map(|mark| mark + 1).chain([total]) {
            let start = bounds[bounds.len() - 1];
            let at = |share: f64| start + (share * (end - start) as f64).round() as usize;
            let last = 1.0 / PARTS as f64;
            bounds.extend((1..PARTS).map(|part| at(part as f64 * last)));
            bounds.extend((1..=HALVINGS).map(|halving| at(1.0 - last * 0.5f64.powi(halving))));
            bounds.push(end);
            bounds.dedup();
        }
        let time = |update: usize| updates.times[update] as f64;
        let cells = || bounds.windows(2).map(|cell| (cell[0], cell[1]));
        let mean = |(start, end): (usize, usize)| (start..end).map(time).sum::<f64>() / (end - start) as f64;
        Cells {
            counts: cells().map(|(start, end)| updates.counts[start..end].iter().sum()).collect(),
            spans: cells().map(|(start, end)| time(end - 1) - time(start.saturating_sub(1))).collect(),
            times: cells().map(mean).collect(),
            bounds,
        }
    }

    /// Returns the number of cells.
    pub(super) fn len(&self) -> usize {
        self.counts.len()
    }

    /// Returns the sum over each cell of one value per update.
    pub(super) fn sums(&self, values: &[f64]) -> Vec<f64> {
        self.bounds.windows(2).map(|cell| values[cell[0]..cell[1]].iter().sum()).collect()
    }

    /// Returns the share of each cell in a chain's average at each of some marks, at which cells end.
    pub(super) fn shares(&self, decays: &Decays, marks: &[usize]) -> Vec<Vec<f64>> {
        // The part of an average that a cell adds, and the factor by which it makes earlier parts smaller.
        let cell = |cell: &[usize]| {
            (cell[0]..cell[1]).fold((0.0, 1.0), |(added, kept), k| {
                (decays.beta[k] * added + decays.one_minus_beta[k], decays.beta[k] * kept)
            })
        };
        let cells: Vec<(f64, f64)> = self.bounds.windows(2).map(cell).collect();
        let at_mark = |mark: &usize| {
            let mut shares = vec![0.0; cells.len()];
            let mut decay = 1.0;
            for c in (0..self.bounds.partition_point(|&bound| bound <= *mark)).rev() {
                shares[c] = decay * cells[c].0;
                decay *= cells[c].1;
            }
            shares
        };
        marks.iter().map(at_mark).collect()
    }

    /// Returns the responses of weights to a random walk and to a walk of the velocity in each cell, for unit variance
    /// per step. `shares` are the sums of the weights over the cells, which sum to 0.
    pub(super) fn responses(&self, shares: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let mut walk = vec![0.0; shares.len()];
        let mut bend = vec![0.0; shares.len()];
        // Sums of the weights after a cell, and of their products with the time since its end.
        let mut after = 0.0;
        let mut ramp = 0.0;
        for c in (0..shares.len()).rev() {
            let updates = (self.bounds[c + 1] - self.bounds[c]) as f64;
            // The mean of the sums from an update of the cell on.
            let tail = after + shares[c] * (updates + 1.0) / (2.0 * updates);
            walk[c] = tail * self.spans[c].sqrt();
            bend[c] = (ramp + 0.5 * tail * self.spans[c]) * self.spans[c].sqrt();
            ramp += tail * self.spans[c];
            after += shares[c];
        }
        (walk, bend)
    }
}
