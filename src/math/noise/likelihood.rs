//! Most likely variances of a Gaussian process, from measured mean products of differences of snapshots.

use std::ops::Range;

use faer::Mat;
use faer::linalg::solvers::{Llt, SelfAdjointEigen, Solve};

/// Rounds of the fit. Later ones change predicted errors by a few hundredths.
const ROUNDS: usize = 60;

/// Weight of a knot's neighbours in the fit of its variance, in degrees of freedom.
///
/// Elements that all move by one function of time are a single sample of it, from which single variances are poorly
/// known.
const NEIGHBOURS: f64 = 0.1;

/// Smallest variance, as a part of one that explains all movement alone.
const LEAST: f64 = 1e-16;

/// Smallest ridge of a matrix that is scaled to unit diagonal.
const RIDGE: f64 = 1e-10;

/// Kinds of movement, each with a variance to be found.
pub(super) struct MovementKinds<'a> {
    /// One column per kind: its covariance matrix for unit variance, column by column.
    pub covariances: &'a Mat<f64>,
    /// Ranges of kinds whose variances change smoothly from one to the next.
    pub smooth: &'a [Range<usize>],
}

/// Returns the variance of each kind for which the measured mean products are most likely.
///
/// The covariance is `G = sum_c v_c B_c + C`. Its log-likelihood `-log det G - tr (G^-1 S)` increases in each round of
/// `v_c <- v_c sqrt(tr (G^-1 S G^-1 B_c) / tr (G^-1 B_c))` (Hunter and Lange 2004: minorisation). Variances of
/// neighbouring knots have a prior at the geometric mean of the two beside them.
pub(super) fn fit(kinds: &MovementKinds<'_>, observed: &Mat<f64>, rounding: &Mat<f64>) -> Vec<f64> {
    let n = observed.nrows();
    let count = kinds.covariances.ncols();
    let trace = |kind: usize| (0..n).map(|i| kinds.covariances[(i * n + i, kind)]).sum::<f64>();
    let total: f64 = (0..n).map(|i| observed[(i, i)]).sum();
    if !(total > 0.0) {
        return vec![0.0; count];
    }
    let alone: Vec<f64> = (0..count).map(|kind| total / trace(kind)).collect();
    let mut variances: Vec<f64> = alone.iter().map(|alone| alone / count as f64).collect();
    for _ in 0..ROUNDS {
        let inverse = scaled_inverse(&covariance(kinds, &variances, rounding));
        let explained = &inverse * observed * &inverse;
        let products = kinds.covariances.transpose() * columns(&explained, &inverse);
        let mut found: Vec<f64> = (0..count).map(|c| (variances[c] * products[(c, 0)]).max(0.0)).collect();
        let mut expected: Vec<f64> = (0..count).map(|c| (variances[c] * products[(c, 1)]).max(1e-300)).collect();
        for range in kinds.smooth {
            add_neighbours(&mut found, &mut expected, &variances, range);
        }
        for c in 0..count {
            variances[c] = (variances[c] * (found[c] / expected[c]).sqrt()).max(LEAST * alone[c]);
        }
    }
    variances
}

/// Adds the prior of neighbouring variances to the sums of one round.
fn add_neighbours(found: &mut [f64], expected: &mut [f64], variances: &[f64], range: &Range<usize>) {
    for c in range.clone().filter(|_| range.len() > 1) {
        let before = if c > range.start { variances[c - 1] } else { variances[c + 1] };
        let after = if c + 1 < range.end { variances[c + 1] } else { variances[c - 1] };
        let ratio = (before.ln() + after.ln()) / 2.0 - variances[c].ln();
        found[c] += NEIGHBOURS * ratio.clamp(-30.0, 30.0).exp();
        expected[c] += NEIGHBOURS;
    }
}

/// Returns `sum_c v_c B_c + C`.
fn covariance(kinds: &MovementKinds<'_>, variances: &[f64], rounding: &Mat<f64>) -> Mat<f64> {
    let n = rounding.nrows();
    let sum = kinds.covariances * Mat::from_fn(variances.len(), 1, |c, _| variances[c]);
    Mat::from_fn(n, n, |i, j| sum[(j * n + i, 0)] + rounding[(i, j)])
}

/// Returns two matrices as the columns of one.
fn columns(a: &Mat<f64>, b: &Mat<f64>) -> Mat<f64> {
    let n = a.nrows();
    Mat::from_fn(n * n, 2, |entry, column| {
        let (i, j) = (entry % n, entry / n);
        if column == 0 { a[(i, j)] } else { b[(i, j)] }
    })
}

/// Returns a symmetric matrix without its negative eigenvalues, and with tiny ones raised.
///
/// Covariances of rounding errors are measured pair by pair, and need not be positive definite.
pub(super) fn positive_part(matrix: &Mat<f64>) -> Mat<f64> {
    let n = matrix.nrows();
    let Ok(eigen) = SelfAdjointEigen::new(matrix.as_ref(), faer::Side::Lower) else {
        return Mat::from_fn(n, n, |i, j| if i == j { matrix[(i, i)].max(0.0) } else { 0.0 });
    };
    let values = eigen.S().column_vector();
    let largest = (0..n).map(|k| values[k]).fold(0.0, f64::max);
    let vectors = eigen.U();
    let scaled = Mat::from_fn(n, n, |i, k| vectors[(i, k)] * values[k].max(1e-12 * largest).sqrt());
    &scaled * scaled.transpose()
}

/// Returns the inverse of a covariance matrix, with the smallest ridge with which it is positive definite.
pub(super) fn scaled_inverse(covariance: &Mat<f64>) -> Mat<f64> {
    let n = covariance.nrows();
    let scale: Vec<f64> =
        (0..n).map(|i| covariance[(i, i)]).map(|v| if v > 0.0 { 1.0 / v.sqrt() } else { 0.0 }).collect();
    let mut ridge = RIDGE;
    loop {
        let entry = |i: usize, j: usize| {
            if i == j { 1.0 + ridge } else { covariance[(i, j)] * scale[i] * scale[j] }
        };
        let matrix = Mat::from_fn(n, n, entry);
        match Llt::new(matrix.as_ref(), faer::Side::Lower) {
            Ok(factor) => {
                let inverse = factor.solve(&Mat::<f64>::identity(n, n));
                return Mat::from_fn(n, n, |i, j| inverse[(i, j)] * scale[i] * scale[j]);
            }
            // A unit matrix is positive definite: no ridge is needed beyond the number of rows.
            Err(_) if ridge < n as f64 => ridge *= 10.0,
            Err(_) => return Mat::zeros(n, n),
        }
    }
}
