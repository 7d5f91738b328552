//! Errors of sets of snapshots under dense updates, and without each of their steps.

use faer::Mat;
use faer::linalg::solvers::{Lblt, Solve};

use crate::math::gram::dense_product;
use crate::math::profile::Profile;
use crate::math::solve::scaled_kkt;

/// Term added to the diagonal of the scaled Gram matrix for errors without a step.
///
/// It is far below the errors that are compared. Without it, the inverse has no correct digits if snapshots are close
/// together.
const RIDGE: f64 = 1e-11;

/// Term added to the diagonal for errors of all steps, below the rounding of the products.
const TINY_RIDGE: f64 = 1e-16;

/// Inner products of the sources with each other, and with the targets at the last step.
///
/// Sources are in order of step, then of profile. Updates are taken as dense: their interval does not change which step
/// is needed least.
pub(super) struct DenseProducts {
    pub tracked: Vec<Profile>,
    targets: Vec<Profile>,
    first: f64,
    times: Vec<f64>,
    /// The products of the tracked profiles with each other, at each time.
    at_times: Vec<Vec<f64>>,
    /// The products of each source with those before it and itself.
    rows: Vec<Vec<f64>>,
    /// The products of each source with the targets at its own time.
    with_targets: Vec<Vec<f64>>,
}

impl DenseProducts {
    pub(super) fn new(tracked: Vec<Profile>, targets: Vec<Profile>, first: u64) -> DenseProducts {
        let first = first as f64;
        let (times, at_times, rows, with_targets) = Default::default();
        DenseProducts { tracked, targets, first, times, at_times, rows, with_targets }
    }

    /// Adds the sources of a step after all others.
    pub(super) fn push(&mut self, step: u64) {
        let time = step as f64;
        let profiles = self.tracked.len();
        let at = |a: &Profile, b: &Profile| dense_product(a, b, time, self.first);
        let here: Vec<f64> = self.tracked.iter().flat_map(|b| self.tracked.iter().map(move |a| at(a, b))).collect();
        for (index, profile) in self.tracked.iter().enumerate() {
            let of_profile = index * profiles..(index + 1) * profiles;
            let mut row = Vec::with_capacity((self.times.len() + 1) * profiles);
            for (&earlier, products) in self.times.iter().zip(&self.at_times) {
                let since = profile.cumulative(earlier, time);
                row.extend(products[of_profile.clone()].iter().map(|product| product * since));
            }
            row.extend(&here[of_profile][..=index]);
            self.rows.push(row);
            self.with_targets.push(self.targets.iter().map(|target| at(profile, target)).collect());
        }
        self.times.push(time);
        self.at_times.push(here);
    }

    /// Removes the sources of the step at an index.
    pub(super) fn remove(&mut self, index: usize) {
        let profiles = self.tracked.len();
        let sources = index * profiles..(index + 1) * profiles;
        self.times.remove(index);
        self.at_times.remove(index);
        self.rows.drain(sources.clone());
        self.with_targets.drain(sources.clone());
        for row in &mut self.rows[sources.start..] {
            row.drain(sources.clone());
        }
    }

    fn product(&self, i: usize, j: usize) -> f64 {
        if i > j { self.rows[i][j] } else { self.rows[j][i] }
    }

    /// Returns the products of a source with the targets at the last step.
    fn with_target(&self, source: usize, target: usize) -> f64 {
        let time = self.times[source / self.tracked.len()];
        self.with_targets[source][target] * self.targets[target].cumulative(time, self.last())
    }

    fn last(&self) -> f64 {
        self.times[self.times.len() - 1]
    }
}

/// The constrained least squares over all steps, with the inverse of its matrix.
pub(super) struct ConstrainedSolve {
    steps: usize,
    profiles: usize,
    inverse: Mat<f64>,
    solution: ScaledSolution,
}

/// Scaled weights of several targets, and their errors.
struct ScaledSolution {
    /// One column per target.
    weights: Mat<f64>,
    /// The squared relative error of each target.
    errors: Vec<f64>,
    /// The inner product of each target with itself.
    squares: Vec<f64>,
}

impl ScaledSolution {
    /// Solves for all targets of `products` by `solve`, which inverts the scaled `matrix`.
    fn new(
        products: &DenseProducts,
        (matrix, scale, unit): (&Mat<f64>, &[f64], f64),
        solve: impl FnOnce(&Mat<f64>) -> Mat<f64>,
    ) -> ScaledSolution {
        let n = scale.len();
        let targets = products.targets.len();
        let product = |i: usize, t: usize| products.with_target(i, t) * scale[i];
        let right = Mat::from_fn(n + 1, targets, |i, t| if i < n { product(i, t) } else { 1.0 / unit });
        let weights = solve(&right);
        let gram_weights = matrix.submatrix(0, 0, n, n) * weights.submatrix(0, 0, n, targets);
        let square = |target| dense_product(target, target, products.last(), products.first);
        let squares: Vec<f64> = products.targets.iter().map(square).collect();
        let mut errors = Vec::with_capacity(targets);
        for (t, square) in squares.iter().enumerate() {
            let terms = (0..n).map(|i| weights[(i, t)] * (gram_weights[(i, t)] - 2.0 * right[(i, t)]));
            errors.push(((square + terms.sum::<f64>()) / square).max(0.0));
        }
        ScaledSolution { weights, errors, squares }
    }
}

impl ConstrainedSolve {
    pub(super) fn new(products: &DenseProducts) -> Self {
        let (matrix, scale, unit) = scaled_kkt(products.rows.len(), |i, j| products.product(i, j), RIDGE);
        let size = matrix.nrows();
        let inverse = Lblt::new(matrix.as_ref(), faer::Side::Lower).solve(&Mat::<f64>::identity(size, size));
        let solution = ScaledSolution::new(products, (&matrix, &scale, unit), |right| &inverse * right);
        ConstrainedSolve { steps: products.times.len(), profiles: products.tracked.len(), inverse, solution }
    }

    /// Returns the worst and the summed squared error of the targets without each step but the last.
    ///
    /// Without the sources `s` the minimum grows by `x_s' (B_ss)^-1 x_s`, where `B` is the inverse of the whole system,
    /// so that no further system has to be solved.
    pub(super) fn errors_without(&self) -> Vec<(f64, f64)> {
        (0..self.steps - 1).map(|step| self.errors_without_step(step)).collect()
    }

    fn errors_without_step(&self, step: usize) -> (f64, f64) {
        let profiles = self.profiles;
        let ScaledSolution { weights, errors, squares } = &self.solution;
        let first = step * profiles;
        let weights = weights.submatrix(first, 0, profiles, errors.len());
        let block = self.inverse.submatrix(first, first, profiles, profiles);
        let solved = Lblt::new(block, faer::Side::Lower).solve(weights);
        let mut worst: f64 = 0.0;
        let mut sum = 0.0;
        for (t, (error, square)) in errors.iter().zip(squares).enumerate() {
            let growth = (0..profiles).map(|i| weights[(i, t)] * solved[(i, t)]).sum::<f64>().max(0.0);
            let error = error + growth / square;
            worst = worst.max(error);
            sum += error;
        }
        (worst, sum)
    }
}

/// Returns the relative error and the noise gain of each target at the last of `steps`, under dense updates.
///
/// They have no meaning, and may be NaN, if snapshots are so much alike that the factors have no correct digits.
pub(crate) fn dense_errors(tracked: &[Profile], targets: &[Profile], first: u64, steps: &[u64]) -> Vec<(f64, f64)> {
    let mut products = DenseProducts::new(tracked.to_vec(), targets.to_vec(), first);
    steps.iter().for_each(|&step| products.push(step));
    let n = products.rows.len();
    let (matrix, scale, unit) = scaled_kkt(n, |i, j| products.product(i, j), TINY_RIDGE);
    let factor = Lblt::new(matrix.as_ref(), faer::Side::Lower);
    let solution = ScaledSolution::new(&products, (&matrix, &scale, unit), |right| factor.solve(right));
    let gain = |t: usize| (0..n).map(|i| (solution.weights[(i, t)] * scale[i]).powi(2)).sum::<f64>().sqrt();
    solution.errors.iter().enumerate().map(|(t, square)| (square.sqrt(), gain(t))).collect()
}
