//! Retention: the snapshots to keep so that the worst error over a range of targets stays small.

use faer::Mat;
use faer::linalg::solvers::{Lblt, Solve};
use serde::{Deserialize, Serialize};

use super::conversion::MAX_SIGMA_REL;
use super::gram::dense_product;
use super::profile::Profile;
use super::solve::scaled_kkt;
use crate::error::{Error, Result};

/// Number of evenly spaced lengths of the range at which the error is computed.
const TARGETS: usize = 12;

/// Term added to the diagonal of the scaled Gram matrix.
///
/// It is far below the errors that are compared. Without it, the inverse has no correct digits if snapshots are close
/// together.
const RIDGE: f64 = 1e-11;

/// Most sources for which errors are computed; a larger solve would take longer than a snapshot should.
///
/// With more sources, evenly spaced ones are good enough.
const MOST_SOURCES: usize = 256;

/// Rule for the steps whose snapshots a run keeps when it has more than `max_checkpoints`.
///
/// The newest step is always kept. The snapshots of one step are kept or dropped together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Retention {
    /// Keeps the steps for a range of power-function targets.
    ///
    /// It drops the step whose loss raises the worst relative error over the range least.
    Range {
        /// The shortest length, as `sigma_rel`.
        from: f64,
        /// The longest length, as `sigma_rel`.
        to: f64,
    },
    /// Keeps the newest steps. Only lengths that fit in them can be synthesized.
    Latest,
    /// Keeps the first snapshot at or after each of these steps, regardless of `max_checkpoints`.
    Steps(Vec<u64>),
}

impl Default for Retention {
    /// Returns the range 0.05 to 0.28.
    fn default() -> Self {
        Retention::Range { from: 0.05, to: 0.28 }
    }
}

impl Retention {
    /// Checks the range, and that a list has steps.
    ///
    /// # Errors
    /// [`Error::Setting`] for lengths that no power-function profile has, for a range in the wrong order, and for an
    /// empty list.
    pub fn check(&self) -> Result<()> {
        match *self {
            Retention::Range { from, to } if !(from > 0.0 && from <= to && to <= MAX_SIGMA_REL) => {
                let reason = format!(
                    "the range of lengths {from} to {to}: give the shorter sigma_rel first, both above 0 and at most \
                     {MAX_SIGMA_REL:.6}"
                );
                Err(Error::Setting { option: "retention", reason })
            }
            Retention::Steps(ref steps) if steps.is_empty() => {
                let reason = "no step is listed: list the steps to keep, or keep the newest (latest)".into();
                Err(Error::Setting { option: "retention", reason })
            }
            _ => Ok(()),
        }
    }

    /// Returns the steps to drop so that `keep` of the increasing `steps` are left.
    ///
    /// The run tracks the profiles `tracked`; its first update was at `first`.
    pub fn surplus(&self, tracked: &[Profile], first: u64, steps: &[u64], keep: usize) -> Vec<u64> {
        let excess = steps.len().saturating_sub(keep.max(1));
        match self {
            Retention::Latest => steps[..excess].to_vec(),
            Retention::Steps(wanted) => unlisted(steps, wanted),
            Retention::Range { from, to } => {
                let targets = targets(*from, *to);
                let mut left = steps.to_vec();
                let mut dropped = Vec::with_capacity(excess);
                for _ in 0..excess {
                    dropped.push(left.remove(least_needed(tracked, &targets, first, &left)));
                }
                dropped
            }
        }
    }
}

/// Returns all steps but the newest and the first at or after each wanted step.
fn unlisted(steps: &[u64], wanted: &[u64]) -> Vec<u64> {
    let mut kept = vec![false; steps.len()];
    for step in wanted {
        if let Some(kept) = kept.get_mut(steps.partition_point(|s| s < step)) {
            *kept = true;
        }
    }
    if let Some(newest) = kept.last_mut() {
        *newest = true;
    }
    steps.iter().zip(kept).filter(|(_, kept)| !kept).map(|(step, _)| *step).collect()
}

/// Returns evenly spaced lengths of a range.
fn targets(from: f64, to: f64) -> Vec<Profile> {
    let length = |i: usize| from + (to - from) * i as f64 / (TARGETS - 1) as f64;
    (0..TARGETS).filter_map(|i| Profile::sigma_rel(length(i).clamp(from, to)).ok()).collect()
}

/// Returns the index of the step to drop, never the last.
fn least_needed(tracked: &[Profile], targets: &[Profile], first: u64, steps: &[u64]) -> usize {
    if steps.len() < 3 {
        return 0;
    }
    if steps.len() * tracked.len() > MOST_SOURCES {
        return most_crowded(steps);
    }
    let products = DenseProducts::new(tracked, targets, first, steps);
    let errors = ConstrainedSolve::new(&products).errors_without();
    // The sum decides between steps that leave the same worst error.
    let best = errors.iter().enumerate().min_by(|(_, a), (_, b)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    best.map_or(0, |(step, _)| step)
}

/// Returns the index of the step whose neighbours are closest together, relative to the square root of the step.
///
/// The root keeps more steps early in training, where power functions bend most. Of a thousand steps thinned to 200, it
/// leaves half the error of even distances or even ratios, or less.
fn most_crowded(steps: &[u64]) -> usize {
    let gap = |i: usize| (steps[i + 1] - steps[i - 1]) as f64 / (steps[i] as f64).sqrt();
    (1..steps.len() - 1).min_by(|&a, &b| gap(a).total_cmp(&gap(b))).unwrap_or(0)
}

/// Inner products of the sources with each other, and with the targets at the last step.
///
/// Sources are in order of step, then of profile. Updates are taken as dense: their interval does not change which step
/// is needed least.
struct DenseProducts {
    steps: usize,
    profiles: usize,
    gram: Mat<f64>,
    /// One column per target.
    with_targets: Mat<f64>,
    /// The inner product of each target with itself.
    target_squares: Vec<f64>,
}

impl DenseProducts {
    fn new(tracked: &[Profile], targets: &[Profile], first: u64, steps: &[u64]) -> DenseProducts {
        let first = first as f64;
        let times: Vec<f64> = steps.iter().map(|&step| step as f64).collect();
        let last = times[times.len() - 1];
        let profiles = tracked.len();
        let sources = times.len() * profiles;
        let tracked_products = products_at_times(tracked, tracked, &times, first);
        let target_products = products_at_times(tracked, targets, &times, first);
        let gram = Mat::from_fn(sources, sources, |i, j| {
            let (i, j) = if i / profiles <= j / profiles { (i, j) } else { (j, i) };
            let (step, profile) = (i / profiles, i % profiles);
            let (later_step, later_profile) = (j / profiles, j % profiles);
            tracked_products[profile][later_profile][step]
                * tracked[later_profile].cumulative(times[step], times[later_step])
        });
        let with_targets = Mat::from_fn(sources, targets.len(), |i, t| {
            let (step, profile) = (i / profiles, i % profiles);
            target_products[profile][t][step] * targets[t].cumulative(times[step], last)
        });
        let target_squares = targets.iter().map(|target| dense_product(target, target, last, first)).collect();
        DenseProducts { steps: times.len(), profiles, gram, with_targets, target_squares }
    }
}

/// Returns the inner products of each profile of `a` with each of `b`, at each time.
fn products_at_times(a: &[Profile], b: &[Profile], times: &[f64], first: f64) -> Vec<Vec<Vec<f64>>> {
    let at_times = |a: &Profile, b: &Profile| times.iter().map(|&time| dense_product(a, b, time, first)).collect();
    a.iter().map(|a| b.iter().map(|b| at_times(a, b)).collect()).collect()
}

/// The constrained least squares over all steps, with the inverse of its matrix.
struct ConstrainedSolve<'a> {
    products: &'a DenseProducts,
    inverse: Mat<f64>,
    /// Scaled weights, one column per target.
    weights: Mat<f64>,
    /// The squared relative error of each target.
    errors: Vec<f64>,
}

impl<'a> ConstrainedSolve<'a> {
    fn new(products: &'a DenseProducts) -> Self {
        let DenseProducts { gram, with_targets, target_squares, .. } = products;
        let n = gram.nrows();
        let targets = target_squares.len();
        let (matrix, scale, unit) = scaled_kkt(n, |i, j| gram[(i, j)], RIDGE);
        let inverse = Lblt::new(matrix.as_ref(), faer::Side::Lower).solve(&Mat::<f64>::identity(n + 1, n + 1));
        let right =
            Mat::from_fn(n + 1, targets, |i, t| if i < n { with_targets[(i, t)] * scale[i] } else { 1.0 / unit });
        let weights = &inverse * &right;
        let gram_weights = matrix.submatrix(0, 0, n, n) * weights.submatrix(0, 0, n, targets);
        let mut errors = Vec::with_capacity(targets);
        for (t, square) in target_squares.iter().enumerate() {
            let terms = (0..n).map(|i| weights[(i, t)] * (gram_weights[(i, t)] - 2.0 * right[(i, t)]));
            errors.push(((square + terms.sum::<f64>()) / square).max(0.0));
        }
        ConstrainedSolve { products, inverse, weights, errors }
    }

    /// Returns the worst and the summed squared error of the targets without each step but the last.
    ///
    /// Without the sources `s` the minimum grows by `x_s' (B_ss)^-1 x_s`, where `B` is the inverse of the whole system,
    /// so that no further system has to be solved.
    fn errors_without(&self) -> Vec<(f64, f64)> {
        (0..self.products.steps - 1).map(|step| self.errors_without_step(step)).collect()
    }

    fn errors_without_step(&self, step: usize) -> (f64, f64) {
        let profiles = self.products.profiles;
        let first = step * profiles;
        let weights = self.weights.submatrix(first, 0, profiles, self.errors.len());
        let block = self.inverse.submatrix(first, first, profiles, profiles);
        let solved = Lblt::new(block, faer::Side::Lower).solve(weights);
        let mut worst: f64 = 0.0;
        let mut sum = 0.0;
        for (t, (error, square)) in self.errors.iter().zip(&self.products.target_squares).enumerate() {
            let growth = (0..profiles).map(|i| weights[(i, t)] * solved[(i, t)]).sum::<f64>().max(0.0);
            let error = error + growth / square;
            worst = worst.max(error);
            sum += error;
        }
        (worst, sum)
    }
}

#[cfg(test)]
mod tests;
