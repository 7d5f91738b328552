//! Fit of three variances, none of them negative, to the differences of pairs of snapshots.

use faer::Mat;
use faer::linalg::solvers::{PartialPivLu, Solve};

/// Measurements of a pair of snapshots.
pub(super) struct Pair {
    /// The mean square difference for unit variance of each kind of movement.
    pub forms: [f64; 3],
    /// The measured mean square difference.
    pub moved: f64,
    /// The part of `moved` that is certain.
    pub certain: f64,
    /// The pair's weight in the fit.
    pub weight: f64,
}

impl Pair {
    /// Returns the mean square difference for the given variances.
    fn expected(&self, variances: [f64; 3]) -> f64 {
        self.forms.iter().zip(variances).map(|(form, variance)| form * variance).sum()
    }

    /// Returns the ratio of the measured difference to the expected one, times the pair's weight.
    pub(super) fn weighted_ratio(&self, variances: [f64; 3]) -> f64 {
        let expected = self.expected(variances);
        if expected > 0.0 { self.weight * self.certain / expected } else { 0.0 }
    }
}

/// Rounds of reweighting. From the third on, changes are too small to be seen in a plan.
const ROUNDS: usize = 12;

/// Returns the variances that minimise the deviations of the measured differences, relative to the expected ones.
///
/// For Gaussian differences these are the most likely variances. Deviations relative to the measured differences would
/// favour small variances if the model does not fit.
pub(super) fn fit(pairs: &[Pair]) -> [f64; 3] {
    let most = pairs.iter().map(|pair| pair.moved).fold(0.0, f64::max);
    if !(most > 0.0) {
        return [0.0; 3];
    }
    let mut variances = least_squares(pairs, |pair| pair.moved.max(1e-6 * most));
    for _ in 0..ROUNDS {
        let previous = variances;
        variances = least_squares(pairs, |pair| pair.expected(previous).max(1e-9 * most));
    }
    variances
}

/// Solves the least squares relative to `scale`, with each set of nonzero variances, and returns the best.
fn least_squares(pairs: &[Pair], scale: impl Fn(&Pair) -> f64) -> [f64; 3] {
    let mut normal = [[0.0; 3]; 3];
    let mut right = [0.0; 3];
    for pair in pairs {
        let weight = pair.weight / scale(pair).powi(2);
        for a in 0..3 {
            right[a] += weight * pair.forms[a] * pair.moved;
            (0..3).for_each(|b| normal[a][b] += weight * pair.forms[a] * pair.forms[b]);
        }
    }
    let sets = (1..8_usize).map(|bits| (0..3).filter(|a| bits >> a & 1 == 1).collect::<Vec<_>>());
    let feasible = sets.filter_map(|set| solve_restricted(&normal, &right, &set));
    // The objective at a minimum, without the terms that do not depend on the variances.
    let objective = |v: &[f64; 3]| -v.iter().zip(right).map(|(v, r)| v * r).sum::<f64>();
    feasible.min_by(|a, b| objective(a).total_cmp(&objective(b))).unwrap_or([0.0; 3])
}

/// Solves for the variances of `set` alone; `None` if one of them is negative.
fn solve_restricted(normal: &[[f64; 3]; 3], right: &[f64; 3], set: &[usize]) -> Option<[f64; 3]> {
    let scale = |a: usize| normal[a][a].sqrt();
    let matrix = Mat::from_fn(set.len(), set.len(), |i, j| normal[set[i]][set[j]] / (scale(set[i]) * scale(set[j])));
    let right = Mat::from_fn(set.len(), 1, |i, _| right[set[i]] / scale(set[i]));
    let solved = PartialPivLu::new(matrix.as_ref()).solve(&right);
    let mut variances = [0.0; 3];
    set.iter().enumerate().for_each(|(i, &a)| variances[a] = solved[(i, 0)] / scale(a));
    variances.iter().all(|v| *v >= 0.0 && v.is_finite()).then_some(variances)
}
