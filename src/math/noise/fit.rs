//! Three variances, none of them negative, that explain how much pairs of snapshots differ.

use faer::Mat;
use faer::linalg::solvers::{PartialPivLu, Solve};

/// What is known of a pair of snapshots.
pub(super) struct Pair {
    /// The mean square difference for each variance being 1.
    pub forms: [f64; 3],
    /// The mean square difference that was found.
    pub moved: f64,
    /// What of that is certain.
    pub sure: f64,
    /// How much the pair counts.
    pub weight: f64,
}

impl Pair {
    /// The mean square difference that variances make.
    fn expected(&self, variances: [f64; 3]) -> f64 {
        self.forms.iter().zip(variances).map(|(form, variance)| form * variance).sum()
    }

    /// How many times the expected difference was found, as far as the pair counts.
    pub(super) fn missed(&self, variances: [f64; 3]) -> f64 {
        let expected = self.expected(variances);
        if expected > 0.0 { self.weight * self.sure / expected } else { 0.0 }
    }
}

/// Rounds of reweighting: the third changes nothing that could be seen in a plan.
const ROUNDS: usize = 12;

/// The variances for which the expected differences are nearest the found ones, relative to the expected: the most likely
/// ones where the differences are Gaussian.
///
/// Nearness relative to the found differences would favour small variances wherever the model does not fit.
pub(super) fn fit(pairs: &[Pair]) -> [f64; 3] {
    let most = pairs.iter().map(|pair| pair.moved).fold(0.0, f64::max);
    if !(most > 0.0) {
        return [0.0; 3];
    }
    let mut variances = weighted(pairs, |pair| pair.moved.max(1e-6 * most));
    for _ in 0..ROUNDS {
        let now = variances;
        variances = weighted(pairs, |pair| pair.expected(now).max(1e-9 * most));
    }
    variances
}

/// Least squares relative to `size`, by trying each set of variances that are not 0.
fn weighted(pairs: &[Pair], size: impl Fn(&Pair) -> f64) -> [f64; 3] {
    let mut normal = [[0.0; 3]; 3];
    let mut right = [0.0; 3];
    for pair in pairs {
        let weight = pair.weight / size(pair).powi(2);
        for a in 0..3 {
            right[a] += weight * pair.forms[a] * pair.moved;
            (0..3).for_each(|b| normal[a][b] += weight * pair.forms[a] * pair.forms[b]);
        }
    }
    let sets = (1..8_usize).map(|bits| (0..3).filter(|a| bits >> a & 1 == 1).collect::<Vec<_>>());
    let feasible = sets.filter_map(|set| restricted(&normal, &right, &set));
    // The objective at a minimum, less what does not depend on the variances.
    let objective = |v: &[f64; 3]| -v.iter().zip(right).map(|(v, r)| v * r).sum::<f64>();
    feasible.min_by(|a, b| objective(a).total_cmp(&objective(b))).unwrap_or([0.0; 3])
}

/// The solution with the variances of `set` alone; none where one of them is negative.
fn restricted(normal: &[[f64; 3]; 3], right: &[f64; 3], set: &[usize]) -> Option<[f64; 3]> {
    let scale = |a: usize| normal[a][a].sqrt();
    let matrix = Mat::from_fn(set.len(), set.len(), |i, j| normal[set[i]][set[j]] / (scale(set[i]) * scale(set[j])));
    let right = Mat::from_fn(set.len(), 1, |i, _| right[set[i]] / scale(set[i]));
    let solved = PartialPivLu::new(matrix.as_ref()).solve(&right);
    let mut variances = [0.0; 3];
    set.iter().enumerate().for_each(|(i, &a)| variances[a] = solved[(i, 0)] / scale(a));
    variances.iter().all(|v| *v >= 0.0 && v.is_finite()).then_some(variances)
}
