//! Covariances of rounding errors that are expected of snapshots not yet stored.

use faer::Mat;

use super::quantization::{INDEPENDENT, excess_of};

/// Returns `C_ij` of snapshots whose elements move by mean squares of `distances`.
///
/// `ulps` are distances of neighbouring values of the snapshots' dtype, each with its share of the elements.
pub(super) fn expected_rounding(distances: &Mat<f64>, ulps: &[(f64, f64)]) -> Mat<f64> {
    let covariance = |i: usize, j: usize| {
        let of_ulp = |(ulp, share): &(f64, f64)| {
            let square = ulp * ulp;
            let h = if square > 0.0 { excess_of(distances[(i, j)] / square) } else { INDEPENDENT };
            share * square / 12.0 * (1.0 - h / INDEPENDENT)
        };
        ulps.iter().map(of_ulp).sum()
    };
    Mat::from_fn(distances.nrows(), distances.nrows(), covariance)
}
