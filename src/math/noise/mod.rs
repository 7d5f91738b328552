//! The expected error of a blend of stored snapshots, and the regularisation that minimises it.
//!
//! A blend `sum_i x_i s_i` of stored snapshots `s_i = p_i + e_i` has two errors. One is the residual of the profiles,
//! `d = sum_i x_i p_i - r`, applied to the parameters' movement; the other is the snapshots' rounding `e_i`. Both are
//! mean squares over the elements of a group of tensors, estimated from a sample:
//!
//! | symbol | meaning | where |
//! | --- | --- | --- |
//! | `d_k` | the residual on update `k`; its sum is 0 | `BlendSolution::residual` |
//! | `v_c` | variance of each kind of movement of the parameters, per element | `Movement` |
//! | `B_c`, `G` | covariances of the snapshots' differences for unit variance, and for all kinds | `MovementBasis` |
//! | `S` | mean products of the snapshots' differences, from `M` | `MovementBasis::fit` |
//! | `u` | the distance of neighbouring values of a stored dtype | `ulps` |
//! | `M_ij` | mean square of `s_i - s_j` | [`Measured`] |
//! | `m_ij` | mean square of `p_i - p_j`: without rounding | [`Measured::moved`] |
//! | `C_ij` | covariance of `e_i` and `e_j` | [`Measured::rounding`] |
//!
//! `quantization` splits `M_ij` into `m_ij` and `C_ij`. `likelihood` finds the variances for which `S` is most likely.
//! `ErrorModel::expected_errors` adds `x' C x` and the mean square of `sum_k d_k` times the parameters that is expected
//! given the snapshots.

mod cells;
mod knots;
mod likelihood;
mod measure;
mod movement;
mod quantization;
mod regularisation;
mod waves;

use faer::Mat;
use rayon::prelude::*;

pub(crate) use measure::{Measured, Sample, measure};
use movement::{Movement, MovementBasis};
pub(crate) use regularisation::RegularisedSolution;

use super::solve::{BlendSolution, System, Updates};

/// Measurements of a group of tensors that move alike.
#[derive(Clone, Debug)]
pub(crate) struct MeasuredGroup {
    pub measured: Measured,
    /// The group's share of all elements.
    pub share: f64,
}

/// Model of the movement and rounding of one system's snapshots, for each group of tensors.
pub(crate) struct ErrorModel<'a> {
    system: &'a System,
    updates: &'a Updates,
    basis: MovementBasis<'a>,
    groups: Vec<GroupModel>,
}

/// Movement and rounding of one group.
struct GroupModel {
    movement: Movement,
    /// `C_ij`.
    rounding: Mat<f64>,
    share: f64,
}

/// Expected error of a blend: root mean squares over the elements, in the units of the model's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ExpectedError {
    /// Error due to the difference of the blend's profile from the target's.
    pub profile: f64,
    /// Error due to the rounding of stored snapshots.
    pub rounding: f64,
}

impl ExpectedError {
    pub(crate) fn total(&self) -> f64 {
        self.profile.hypot(self.rounding)
    }
}

impl<'a> ErrorModel<'a> {
    /// Creates the model of a system from measurements of its sources; `None` if the sources have no history.
    pub(crate) fn new(system: &'a System, groups: Vec<MeasuredGroup>) -> Option<ErrorModel<'a>> {
        let updates = system.updates()?;
        let basis = MovementBasis::new(updates);
        let fit = |MeasuredGroup { measured, share }| {
            let movement = basis.fit(&measured);
            GroupModel { movement, rounding: measured.rounding, share }
        };
        let groups = groups.into_par_iter().map(fit).collect();
        Some(ErrorModel { system, updates, basis, groups })
    }

    /// Returns the expected error of each group.
    fn expected_errors(&self, blend: &BlendSolution) -> Vec<ExpectedError> {
        let of_group = |group: &GroupModel| {
            let profile = self.basis.mean_square(&group.movement, &blend.residual);
            // Measured covariances need not be positive definite to the last digit.
            let rounding = quadratic_form(&group.rounding, &blend.solution.weights).max(0.0);
            ExpectedError { profile: profile.sqrt(), rounding: rounding.sqrt() }
        };
        self.groups.iter().map(of_group).collect()
    }

    /// Returns the expected error over the elements of all groups.
    fn expected_over_all(&self, groups: &[ExpectedError]) -> ExpectedError {
        let mean_square = |part: fn(&ExpectedError) -> f64| {
            let squares = self.groups.iter().zip(groups).map(|(group, error)| group.share * part(error).powi(2));
            squares.sum::<f64>().sqrt()
        };
        ExpectedError { profile: mean_square(|error| error.profile), rounding: mean_square(|error| error.rounding) }
    }
}

/// Returns `x' A x`.
fn quadratic_form(matrix: &Mat<f64>, x: &[f64]) -> f64 {
    let row = |i: usize| -> f64 { x.iter().enumerate().map(|(j, xj)| matrix[(i, j)] * xj).sum() };
    x.iter().enumerate().map(|(i, xi)| xi * row(i)).sum()
}

#[cfg(test)]
mod tests;
