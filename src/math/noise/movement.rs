//! Movement of parameters during training: a Gaussian process whose variances change with time.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;

use faer::Mat;

use super::super::solve::Updates;
use super::cells::Cells;
use super::knots::knot_weights;
use super::likelihood::{MovementKinds, fit, positive_part, scaled_inverse};
use super::measure::Measured;
use super::waves::{Wave, alternating, alternating_at_marks, waves};

/// Most snapshots that the movement is fitted to, by their steps. The others only have weights.
const MOST_SOURCES: usize = 48;

/// Parts of the time between snapshots on which the variances of noise, walk and velocity are linear.
const SUBDIVISIONS: [usize; 3] = [2, 2, 1];

/// Responses of differences of snapshots to unit movement of each kind, shared by all groups of tensors.
///
/// The kinds are white noise, a random walk, and a walk of the velocity, each around one knot of time; a straight
/// line; and oscillations.
pub(super) struct MovementBasis<'a> {
    updates: Cow<'a, Updates>,
    /// The updates of the snapshots that are fitted.
    marks: Vec<usize>,
    pub cells: Cells,
    waves: Vec<Wave>,
    /// Pairs of sources whose differences are fitted.
    pairs: Vec<(usize, usize)>,
    /// One row per pair, one column per response.
    responses: Mat<f64>,
    /// Weights of the responses in each kind's variance.
    kinds: Vec<(Range<usize>, Vec<f64>)>,
    /// One column per kind: the covariance matrix of the pairs for unit variance.
    covariances: Mat<f64>,
    /// Ranges of kinds whose variances change smoothly from one to the next.
    smooth: Vec<Range<usize>>,
}

/// Movement of one group of tensors: variances, and what the snapshots say beyond them.
pub(super) struct Movement {
    /// Variance of each response.
    pub variances: Vec<f64>,
    /// The inverse covariance of the pairs.
    inverse: Mat<f64>,
    /// `S`, the measured mean products of the pairs' differences.
    observed: Mat<f64>,
}

impl<'a> MovementBasis<'a> {
    /// Computes the responses of a system's sources. Cells also end at `cuts`.
    pub(super) fn new(updates: Cow<'a, Updates>, cuts: &[usize]) -> MovementBasis<'a> {
        let marks = thinned_marks(&updates);
        let ends: BTreeSet<usize> = marks.iter().chain(cuts).copied().collect();
        let cells = Cells::new(&updates, &ends.into_iter().collect::<Vec<_>>());
        let waves = waves(&updates, &cells, &marks);
        let sources = fitted_sources(&updates, &marks);
        let pairs: Vec<(usize, usize)> = sources.windows(2).map(|pair| (pair[0], pair[1])).collect();
        let mut basis = MovementBasis {
            updates,
            marks: marks.clone(),
            cells,
            waves,
            pairs,
            responses: Mat::zeros(0, 0),
            kinds: Vec::new(),
            covariances: Mat::zeros(0, 0),
            smooth: Vec::new(),
        };
        let rows = basis.pair_responses(&marks);
        basis.responses = Mat::from_fn(rows.len(), rows.first().map_or(0, Vec::len), |i, j| rows[i][j]);
        basis.set_kinds(&marks);
        basis
    }

    /// Returns the responses of each pair's difference.
    fn pair_responses(&self, marks: &[usize]) -> Vec<Vec<f64>> {
        let shares: Vec<Vec<Vec<f64>>> =
            self.updates.decays.iter().map(|decays| self.cells.shares(decays, marks)).collect();
        let alternating = alternating_at_marks(&self.updates, marks);
        let place = |source: usize| {
            let (chain, mark) = self.updates.sources[source];
            (chain, marks.partition_point(|&update| update < self.updates.marks[mark]))
        };
        let row = |&(i, j): &(usize, usize)| {
            let ((chain_i, mark_i), (chain_j, mark_j)) = (place(i), place(j));
            let later = shares[chain_j][mark_j].iter();
            let difference: Vec<f64> = later.zip(&shares[chain_i][mark_i]).map(|(b, a)| b - a).collect();
            self.responses(&difference, alternating[chain_j][mark_j] - alternating[chain_i][mark_i])
        };
        self.pairs.iter().map(row).collect()
    }

    /// Returns the responses of weights with the given sums over the cells.
    pub(super) fn responses(&self, shares: &[f64], alternating: f64) -> Vec<f64> {
        let mut responses = white_responses(shares, &self.cells.counts);
        let (walk, bend) = self.cells.responses(shares);
        let product = |values: &Vec<f64>| shares.iter().zip(values).map(|(share, value)| share * value).sum::<f64>();
        responses.extend(walk);
        responses.extend(bend);
        responses.push(product(&self.cells.times));
        responses.extend(self.waves.iter().flat_map(|wave| &wave.values).map(product));
        responses.push(alternating);
        responses
    }

    /// Lists the kinds of movement to which some pair responds, with their covariances.
    fn set_kinds(&mut self, marks: &[usize]) {
        let cells = self.cells.len();
        let mut kinds = Vec::new();
        for (kind, subdivisions) in SUBDIVISIONS.into_iter().enumerate() {
            let range = kind * cells..(kind + 1) * cells;
            kinds.extend(knot_weights(&self.cells, marks, subdivisions).into_iter().map(|w| (range.clone(), w)));
        }
        let mut start = SUBDIVISIONS.len() * cells;
        let single = [1].into_iter().chain(self.waves.iter().map(|wave| wave.values.len())).chain([1]);
        for length in single {
            kinds.push((start..start + length, vec![1.0; length]));
            start += length;
        }
        let mut columns = Vec::new();
        for (range, weights) in kinds {
            let scaled = Mat::from_fn(self.pairs.len(), range.len(), |i, j| {
                self.responses[(i, range.start + j)] * weights[j].sqrt()
            });
            let covariance = &scaled * scaled.transpose();
            if (0..self.pairs.len()).any(|i| covariance[(i, i)] > 0.0) {
                columns.push(covariance);
                self.kinds.push((range, weights));
            }
        }
        let n = self.pairs.len();
        self.covariances = Mat::from_fn(n * n, columns.len(), |entry, kind| columns[kind][(entry % n, entry / n)]);
        let of_range = |kind: usize| self.kinds.iter().take_while(|(range, _)| range.start / cells < kind).count();
        self.smooth = (0..SUBDIVISIONS.len()).map(|kind| of_range(kind)..of_range(kind + 1)).collect();
    }

    /// Fits the variances to the mean squares by which sources differ.
    pub(super) fn fit(&self, measured: &Measured) -> Movement {
        let n = self.pairs.len();
        let squares = |i: usize, j: usize| measured.moved[(i, j)] + measured.rounding_distance(i, j);
        let products = |of: &dyn Fn(usize, usize) -> f64| {
            Mat::from_fn(n, n, |a, b| {
                let ((i, j), (k, l)) = (self.pairs[a], self.pairs[b]);
                0.5 * (of(j, k) + of(i, l) - of(j, l) - of(i, k))
            })
        };
        let observed = products(&squares);
        let rounding = positive_part(&products(&|i, j| measured.rounding_distance(i, j)));
        let kinds = MovementKinds { covariances: &self.covariances, smooth: &self.smooth };
        let by_kind = fit(&kinds, &observed, &rounding);
        let mut variances = vec![0.0; self.responses.ncols()];
        let mut covariance = rounding;
        for (variance, (range, weights)) in by_kind.iter().zip(&self.kinds) {
            range.clone().zip(weights).for_each(|(response, weight)| variances[response] += variance * weight);
        }
        let scaled = Mat::from_fn(n, variances.len(), |i, j| self.responses[(i, j)] * variances[j].sqrt());
        covariance += &scaled * scaled.transpose();
        Movement { variances, inverse: scaled_inverse(&covariance), observed }
    }

    /// Returns the mean square of a blend of the parameters, with weights on the updates whose sum is 0.
    ///
    /// It is the expectation given the snapshots: `q - e' G^-1 e + e' G^-1 S G^-1 e`, with the variance `q` of the
    /// blend and its covariances `e` with the pairs' differences.
    pub(super) fn mean_square(&self, movement: &Movement, weights: &[f64]) -> f64 {
        let shares = self.cells.sums(weights);
        let responses = self.responses(&shares, alternating(&self.updates, weights));
        self.given_snapshots(movement, &responses) + self.within_cells(weights, &shares, &movement.variances)
    }

    /// Returns the mean square of a blend with some responses, given the snapshots.
    pub(super) fn given_snapshots(&self, movement: &Movement, responses: &[f64]) -> f64 {
        let variances = &movement.variances;
        let weighted = Mat::from_fn(responses.len(), 1, |i, _| variances[i] * responses[i]);
        let covariances = &self.responses * &weighted;
        // `G^-1 e` first: the product of all three matrices would be inexact.
        let expected = &movement.inverse * &covariances;
        let product = |a: &Mat<f64>, b: &Mat<f64>| (0..a.nrows()).map(|i| a[(i, 0)] * b[(i, 0)]).sum::<f64>();
        let prior: f64 = responses.iter().zip(variances).map(|(r, v)| v * r * r).sum();
        let variance = prior - product(&expected, &covariances);
        let mean_square = product(&expected, &(&movement.observed * &expected));
        variance.max(0.0) + mean_square.max(0.0)
    }

    /// Returns the cells between each two snapshots, and up to the first.
    pub(super) fn intervals(&self) -> Vec<Range<usize>> {
        let start = |mark: usize| self.cells.bounds.partition_point(|&bound| bound <= mark);
        let ends: Vec<usize> = self.marks.iter().map(|&mark| start(mark)).collect();
        let starts = std::iter::once(0).chain(ends.iter().copied());
        starts.zip(ends.iter().copied()).map(|(start, end)| start..end).collect()
    }

    /// Returns the times of the snapshots around an interval; 0 before the first.
    pub(super) fn times_around(&self, interval: usize) -> (u64, u64) {
        let time = |mark: usize| self.updates.times[self.marks[mark]];
        (interval.checked_sub(1).map_or(0, time), time(interval))
    }

    /// Returns the mean products of blends with some responses, one row each, given the snapshots.
    pub(super) fn products_given_snapshots(&self, movement: &Movement, rows: &Mat<f64>) -> Mat<f64> {
        let variances = &movement.variances;
        let scaled =
            |rows: &Mat<f64>| Mat::from_fn(rows.nrows(), rows.ncols(), |i, j| rows[(i, j)] * variances[j].sqrt());
        let (own, pairs) = (scaled(rows), scaled(&self.responses));
        let covariances = &own * pairs.transpose();
        let expected = &covariances * &movement.inverse;
        &own * own.transpose() - &expected * covariances.transpose()
            + &(&expected * &movement.observed) * expected.transpose()
    }

    /// Returns the variance by white noise of the differences of weights from their means over the cells.
    fn within_cells(&self, weights: &[f64], shares: &[f64], variances: &[f64]) -> f64 {
        let counts = &self.updates.counts;
        let of_cell = |(c, cell): (usize, &[usize])| {
            let squares: f64 = (cell[0]..cell[1]).map(|k| weights[k] * weights[k] / counts[k]).sum();
            variances[c] * (squares - shares[c] * shares[c] / self.cells.counts[c]).max(0.0)
        };
        self.cells.bounds.windows(2).enumerate().map(of_cell).sum()
    }
}

/// Returns the responses of sums of weights over cells to the noise of each update; 0 for cells without an update.
pub(super) fn white_responses(shares: &[f64], counts: &[f64]) -> Vec<f64> {
    let of_cell = |(share, count): (&f64, &f64)| if *count > 0.0 { share / count.sqrt() } else { 0.0 };
    shares.iter().zip(counts).map(of_cell).collect()
}

/// Returns the updates of snapshots, few enough for all chains together: those amid the closest others are left out.
fn thinned_marks(updates: &Updates) -> Vec<usize> {
    let mut marks = updates.marks.clone();
    let most = (MOST_SOURCES / updates.decays.len().max(1)).max(3);
    let time = |mark: usize| updates.times[mark] as f64;
    while marks.len() > most {
        let gap = |i: usize| time(marks[i + 1]) - i.checked_sub(1).map_or(0.0, |before| time(marks[before]));
        let Some(closest) = (0..marks.len() - 1).min_by(|&a, &b| gap(a).total_cmp(&gap(b))) else { break };
        marks.remove(closest);
    }
    marks
}

/// Returns the sources at some marks, in order of chain and time, each once.
fn fitted_sources(updates: &Updates, marks: &[usize]) -> Vec<usize> {
    let mut sources: Vec<usize> =
        (0..updates.sources.len()).filter(|&i| marks.contains(&updates.marks[updates.sources[i].1])).collect();
    sources.sort_by_key(|&i| updates.sources[i]);
    sources.dedup_by_key(|i| updates.sources[*i]);
    sources
}
