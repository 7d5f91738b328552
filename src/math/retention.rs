//! Which snapshots to keep: those without which the averages that may be asked for would be worst off.

use faer::Mat;
use faer::linalg::solvers::{Lblt, Solve};
use serde::{Deserialize, Serialize};

use super::conversion::MAX_SIGMA_REL;
use super::gram::dense_product;
use super::profile::Profile;
use crate::error::{Error, Result};

/// Lengths within the target range at which the error is looked at, evenly spaced.
const TARGETS: usize = 12;

/// Added to the diagonal of the scaled Gram matrix: what it hides is far below the errors that are compared, and without it
/// the inverse of a matrix of snapshots that lie close together would have no right digits.
const RIDGE: f64 = 1e-11;

/// With more sources than this the choice would take longer than a snapshot should; with so many any even one does.
const MOST_SOURCES: usize = 256;

/// Which steps' snapshots a run keeps when it has more than `max_checkpoints`. The newest always stays, and the snapshots of
/// one step stay or go together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Retention {
    /// Those that serve a range of power-function targets: what is dropped is the step without which the worst relative error
    /// over the range stays smallest.
    Range {
        /// The shortest length, as `sigma_rel`.
        from: f64,
        /// The longest.
        to: f64,
    },
    /// The newest. Only lengths that fit in them can then be synthesized.
    Latest,
    /// For each of these steps the first snapshot at or after it, however many that makes; `max_checkpoints` does not count.
    Steps(Vec<u64>),
}

impl Default for Retention {
    /// The range 0.05 to 0.28.
    fn default() -> Self {
        Retention::Range { from: 0.05, to: 0.28 }
    }
}

impl Retention {
    /// Checks the range, and that a list has steps.
    ///
    /// # Errors
    /// [`Error::Setting`] for lengths that no power-function profile has, or in the wrong order, and for an empty list.
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
                let reason = "no step is listed: name those to keep, or keep the newest (latest)".into();
                Err(Error::Setting { option: "retention", reason })
            }
            _ => Ok(()),
        }
    }

    /// The steps to drop of all `steps`, which grow, when `keep` may stay: of a run that tracks `tracked` and whose first update
    /// was at `first`.
    pub fn surplus(&self, tracked: &[Profile], first: u64, steps: &[u64], keep: usize) -> Vec<u64> {
        let excess = steps.len().saturating_sub(keep.max(1));
        match self {
            Retention::Latest => steps[..excess].to_vec(),
            Retention::Steps(wanted) => unlisted(steps, wanted),
            Retention::Range { from, to } => {
                let targets = targets(*from, *to);
                let mut left = steps.to_vec();
                (0..excess).map(|_| left.remove(least_missed(tracked, &targets, first, &left))).collect()
            }
        }
    }
}

/// All but the first snapshot at or after each step that is wanted, and the newest.
fn unlisted(steps: &[u64], wanted: &[u64]) -> Vec<u64> {
    let serves: Vec<usize> = wanted.iter().map(|step| steps.partition_point(|s| s < step)).collect();
    let stays = |i: usize| i + 1 == steps.len() || serves.contains(&i);
    steps.iter().enumerate().filter(|(i, _)| !stays(*i)).map(|(_, step)| *step).collect()
}

/// Evenly spaced lengths of a range.
fn targets(from: f64, to: f64) -> Vec<Profile> {
    let length = |i: usize| from + (to - from) * i as f64 / (TARGETS - 1) as f64;
    (0..TARGETS).filter_map(|i| Profile::sigma_rel(length(i).clamp(from, to)).ok()).collect()
}

/// The index of the step to drop, never the last.
fn least_missed(tracked: &[Profile], targets: &[Profile], first: u64, steps: &[u64]) -> usize {
    if steps.len() < 3 {
        return 0;
    }
    if steps.len() * tracked.len() > MOST_SOURCES {
        return most_crowded(steps);
    }
    let products = Products::new(tracked, targets, first, steps);
    let errors = Solved::new(&products).errors_without();
    // Where several leave the same worst error, the one that costs all targets together least.
    let worse = |a: &(f64, f64), b: &(f64, f64)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1));
    let least = errors.iter().enumerate().min_by(|a, b| worse(a.1, b.1));
    least.map_or(0, |(step, _)| step)
}

/// The step whose neighbours lie closest together, more so early in training, where power functions bend most. Tried on a
/// thousand steps beside even distances and even ratios: of 200 kept, it leaves half their errors or less.
fn most_crowded(steps: &[u64]) -> usize {
    let gap = |i: usize| (steps[i + 1] - steps[i - 1]) as f64 / (steps[i] as f64).sqrt();
    (1..steps.len() - 1).min_by(|&a, &b| gap(a).total_cmp(&gap(b))).unwrap_or(0)
}

/// Inner products of the sources, step by step and within a step profile by profile, and of the targets at the last step; over
/// dense updates, since which step is missed least does not depend on how far apart they are.
struct Products {
    steps: usize,
    profiles: usize,
    gram: Mat<f64>,
    /// A column for each target.
    with_targets: Mat<f64>,
    /// Each target with itself.
    own: Vec<f64>,
}

impl Products {
    fn new(tracked: &[Profile], targets: &[Profile], first: u64, steps: &[u64]) -> Products {
        let (n, p, first) = (steps.len(), tracked.len(), first as f64);
        let times: Vec<f64> = steps.iter().map(|&step| step as f64).collect();
        let last = times[n - 1];
        let at_each =
            |a: &Profile, b: &Profile| times.iter().map(|&t| dense_product(a, b, t, first)).collect::<Vec<_>>();
        let with_all = |a: &Profile, all: &[Profile]| all.iter().map(|b| at_each(a, b)).collect::<Vec<_>>();
        let among: Vec<_> = tracked.iter().map(|profile| with_all(profile, tracked)).collect();
        let against: Vec<_> = tracked.iter().map(|profile| with_all(profile, targets)).collect();
        let gram = |i: usize, j: usize| {
            let (i, j) = if i / p <= j / p { (i, j) } else { (j, i) };
            among[i % p][j % p][i / p] * tracked[j % p].cumulative(times[i / p], times[j / p])
        };
        Products {
            steps: n,
            profiles: p,
            gram: Mat::from_fn(n * p, n * p, gram),
            with_targets: Mat::from_fn(n * p, targets.len(), |i, t| {
                against[i % p][t][i / p] * targets[t].cumulative(times[i / p], last)
            }),
            own: targets.iter().map(|target| dense_product(target, target, last, first)).collect(),
        }
    }
}

/// The constrained least squares over all steps, and the inverse of its matrix.
struct Solved<'a> {
    products: &'a Products,
    inverse: Mat<f64>,
    /// Scaled weights, a column for each target.
    weights: Mat<f64>,
    /// The squared error of each target over its own square.
    errors: Vec<f64>,
}

impl<'a> Solved<'a> {
    fn new(products: &'a Products) -> Self {
        let Products { gram, with_targets, own, .. } = products;
        let (n, targets) = (gram.nrows(), own.len());
        let scale: Vec<f64> = (0..n).map(|i| 1.0 / gram[(i, i)].sqrt()).collect();
        let unit = scale.iter().fold(0.0, |most: f64, s| most.max(*s));
        let matrix = Mat::from_fn(n + 1, n + 1, |i, j| match (i < n, j < n) {
            (true, true) => gram[(i, j)] * scale[i] * scale[j] + if i == j { RIDGE } else { 0.0 },
            (true, false) => scale[i] / unit,
            (false, true) => scale[j] / unit,
            (false, false) => 0.0,
        });
        let inverse = Lblt::new(matrix.as_ref(), faer::Side::Lower).solve(&Mat::<f64>::identity(n + 1, n + 1));
        let right =
            Mat::from_fn(n + 1, targets, |i, t| if i < n { with_targets[(i, t)] * scale[i] } else { 1.0 / unit });
        let weights = &inverse * &right;
        let of_gram = matrix.submatrix(0, 0, n, n) * weights.submatrix(0, 0, n, targets);
        let error = |t: usize| {
            let terms = (0..n).map(|i| weights[(i, t)] * (of_gram[(i, t)] - 2.0 * right[(i, t)]));
            ((own[t] + terms.sum::<f64>()) / own[t]).max(0.0)
        };
        let errors = (0..targets).map(error).collect();
        Solved { products, inverse, weights, errors }
    }

    /// For each step but the last the worst and the summed squared error of the targets without it.
    ///
    /// Without the sources `s` the minimum grows by `x_s' (B_ss)^-1 x_s`, `B` being the inverse of the whole system: nothing has to
    /// be solved anew.
    fn errors_without(&self) -> Vec<(f64, f64)> {
        (0..self.products.steps - 1).map(|step| self.errors_without_step(step)).collect()
    }

    fn errors_without_step(&self, step: usize) -> (f64, f64) {
        let (p, targets) = (self.products.profiles, self.errors.len());
        let own = self.weights.submatrix(step * p, 0, p, targets);
        let block = self.inverse.submatrix(step * p, step * p, p, p);
        let solved = Lblt::new(block, faer::Side::Lower).solve(own);
        let growth = |t: usize| (0..p).map(|i| own[(i, t)] * solved[(i, t)]).sum::<f64>().max(0.0);
        let without = (0..targets).map(|t| self.errors[t] + growth(t) / self.products.own[t]);
        without.fold((0.0, 0.0), |(worst, sum), error| (f64::max(worst, error), sum + error))
    }
}

#[cfg(test)]
mod tests;
