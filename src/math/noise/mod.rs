//! The error that a blend of stored snapshots will have, and the regularisation that makes it smallest.
//!
//! A blend `sum_i x_i s_i` of stored snapshots `s_i = p_i + e_i` misses its target by two things: the difference
//! `d = sum_i x_i p_i - r` of the profiles, which meets the parameters' movement, and the snapshots' rounding `e_i`. Both are
//! mean squares over the elements, taken from a sample of them:
//!
//! | symbol | meaning | where |
//! | --- | --- | --- |
//! | `d_k` | the difference on update `k`; its sum is 0 | `Blend::difference` |
//! | `v_l`, `v_r`, `v_w` | drift, random walk and white noise of the parameters, per element | [`Trajectory`] |
//! | `u` | the distance of neighbouring values of a stored dtype | `ulps` |
//! | `M_ij` | mean square of `s_i - s_j` | [`Measured`] |
//! | `m_ij` | the same of `p_i - p_j`: without rounding | [`Measured::moved`] |
//! | `C_ij` | covariance of `e_i` and `e_j` | [`Measured::rounding`] |
//!
//! `M_ij` gives `m_ij` and `C_ij` (`staircase`), the `m_ij` of all pairs give the trajectory (`fit`), and `x' C x` beside
//! the trajectory's answer to `d` is the error (`Model::expect`).

mod choice;
mod fit;
mod kernels;
mod measure;
mod staircase;
mod trajectory;

use faer::Mat;

pub(crate) use choice::Choice;
pub(crate) use measure::{Measured, Sample, measure};
use trajectory::Trajectory;

use super::solve::{Blend, System, Updates};

/// What is known of the parameters and the snapshots of one system.
pub(crate) struct Model<'a> {
    system: &'a System,
    updates: &'a Updates,
    trajectory: Trajectory,
    /// `C_ij`.
    rounding: Mat<f64>,
}

/// The expected error of a blend: root mean squares over the elements, in the units of the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Expected {
    /// Because the blend's profile is not the target's.
    pub profile: f64,
    /// Because snapshots are stored rounded.
    pub rounding: f64,
}

impl Expected {
    pub(crate) fn total(&self) -> f64 {
        self.profile.hypot(self.rounding)
    }
}

impl<'a> Model<'a> {
    /// The model of a system whose sources were measured; none where the sources carry no history.
    pub(crate) fn new(system: &'a System, measured: Measured) -> Option<Model<'a>> {
        let updates = system.updates()?;
        let trajectory = Trajectory::fit(updates, &measured);
        Some(Model { system, updates, trajectory, rounding: measured.rounding })
    }

    /// The error that a blend is expected to have.
    fn expect(&self, blend: &Blend) -> Expected {
        let profile = self.trajectory.mean_square(&self.updates.times, &blend.difference);
        // Measured covariances need not be positive definite to the last digit.
        let rounding = quadratic(&self.rounding, &blend.solution.weights).max(0.0);
        Expected { profile: profile.sqrt(), rounding: rounding.sqrt() }
    }
}

/// `x' A x`.
fn quadratic(matrix: &Mat<f64>, x: &[f64]) -> f64 {
    let row = |i: usize| -> f64 { x.iter().enumerate().map(|(j, xj)| matrix[(i, j)] * xj).sum() };
    x.iter().enumerate().map(|(i, xi)| xi * row(i)).sum()
}

#[cfg(test)]
mod tests;
