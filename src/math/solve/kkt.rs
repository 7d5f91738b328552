//! The linear system of the constrained least squares: its scaling, its factors and its condition.

use faer::Mat;
use faer::linalg::solvers::{Lblt, Solve};

/// The symmetric system of the constrained least squares, scaled to unit diagonal and factored.
pub(super) struct Kkt {
    matrix: Mat<f64>,
    factor: Lblt<f64>,
    /// Divisor of each weight in the scaled system.
    scale: Vec<f64>,
    /// Scale of the constraint, which brings it to the size of the other rows.
    unit: f64,
    pub rho_squared: f64,
    /// The condition number in the 1-norm.
    pub condition: f64,
}

impl Kkt {
    /// Factors the system. `ridge` is added to the scaled diagonal of the factors only, so that refinement converges to
    /// the solution without it.
    pub(super) fn new(gram: &Mat<f64>, order: &[usize], rho: f64, ridge: f64) -> Kkt {
        let rho_squared = rho * rho;
        let entry = |i: usize, j: usize| gram[(order[i], order[j])] + if i == j { rho_squared } else { 0.0 };
        let (matrix, scale, unit) = scaled_kkt(order.len(), entry, ridge);
        let factor = Lblt::new(matrix.as_ref(), faer::Side::Lower);
        let mut kkt = Kkt { matrix, factor, scale, unit, rho_squared, condition: 0.0 };
        kkt.condition = kkt.estimate_condition();
        kkt
    }

    /// Returns the weights, of sum `sum`, for a right-hand side in the units of the inner product.
    pub(super) fn solve(&self, right: &[f64], sum: f64) -> Vec<f64> {
        let n = self.scale.len();
        let scaled = |i: usize| if i < n { right[i] * self.scale[i] } else { sum / self.unit };
        let solved = self.factor.solve(&Mat::from_fn(n + 1, 1, |i, _| scaled(i)));
        (0..n).map(|i| solved[(i, 0)] * self.scale[i]).collect()
    }

    /// Estimates `||A|| ||A^-1||` in the 1-norm, the second factor by Hager's method (Higham 1988, Algorithm 2.1).
    fn estimate_condition(&self) -> f64 {
        let n = self.matrix.nrows();
        let mut x = Mat::from_fn(n, 1, |_, _| 1.0 / n as f64);
        let mut inverse_norm = 0.0;
        for _ in 0..5 {
            let y = self.factor.solve(&x);
            let norm: f64 = (0..n).map(|i| y[(i, 0)].abs()).sum();
            let signs = Mat::from_fn(n, 1, |i, _| y[(i, 0)].signum());
            let z = self.factor.solve(&signs);
            let largest = (0..n).max_by(|&i, &j| z[(i, 0)].abs().total_cmp(&z[(j, 0)].abs())).unwrap_or(0);
            let here: f64 = (0..n).map(|i| z[(i, 0)] * x[(i, 0)]).sum();
            inverse_norm = f64::max(inverse_norm, norm);
            if z[(largest, 0)].abs() <= here {
                break;
            }
            x = Mat::from_fn(n, 1, |i, _| f64::from(u8::from(i == largest)));
        }
        let norm = (0..n).map(|j| (0..n).map(|i| self.matrix[(i, j)].abs()).sum::<f64>()).fold(0.0, f64::max);
        norm * inverse_norm
    }

    /// Returns the two sources with the largest cosine, and the cosine.
    pub(super) fn most_similar(&self) -> (usize, usize, f64) {
        let n = self.scale.len();
        let pairs = (0..n).flat_map(|j| (0..j).map(move |i| (i, j)));
        let (i, j) = pairs.max_by(|&a, &b| self.matrix[a].total_cmp(&self.matrix[b])).unwrap_or((0, 0));
        (i, j, self.matrix[(i, j)])
    }
}

/// Returns the scaled matrix of `n` sources and the constraint, the scale of each source, and that of the constraint.
///
/// Sources are scaled to unit diagonal, to which `ridge` is then added. The constraint is scaled to the size of the
/// other rows.
pub(in crate::math) fn scaled_kkt(
    n: usize,
    entry: impl Fn(usize, usize) -> f64,
    ridge: f64,
) -> (Mat<f64>, Vec<f64>, f64) {
    let scale: Vec<f64> = (0..n).map(|i| 1.0 / entry(i, i).sqrt()).collect();
    let unit = scale.iter().fold(0.0, |most: f64, s| most.max(*s));
    let matrix = Mat::from_fn(n + 1, n + 1, |i, j| match (i < n, j < n) {
        (true, true) => entry(i, j) * scale[i] * scale[j] + if i == j { ridge } else { 0.0 },
        (true, false) => scale[i] / unit,
        (false, true) => scale[j] / unit,
        (false, false) => 0.0,
    });
    (matrix, scale, unit)
}
