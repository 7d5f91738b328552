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
mod events;
mod expected_rounding;
mod knots;
mod like;
mod likelihood;
mod measure;
mod movement;
mod named;
mod quantization;
mod regularisation;
mod waves;

use std::borrow::Cow;
use std::sync::Arc;

use faer::Mat;
use rayon::prelude::*;

use expected_rounding::expected_rounding;
use like::LikeBasis;
pub(crate) use measure::{Measured, Sample, measure};
use movement::{Movement, MovementBasis};
use named::NamedBasis;
pub use named::{MovementKind, NamedMovement};
pub(crate) use regularisation::RegularisedSolution;

use super::solve::{BlendSolution, System, Updates};

/// Measurements of a group of tensors that move alike.
#[derive(Clone, Debug)]
pub(crate) struct MeasuredGroup {
    pub measured: Measured,
    /// The group's share of all elements.
    pub share: f64,
}

/// Measurements of a group of tensors of a training that another one is expected to be like.
#[derive(Clone, Debug)]
pub(crate) struct LikeGroup {
    /// Measurements of the other training's snapshots.
    pub group: MeasuredGroup,
    /// Distances of neighbouring values in the new training's snapshots, each with its share of the elements.
    pub ulps: Vec<(f64, f64)>,
}

/// Range of an expected error that one event between two snapshots makes the most of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ExpectedEvent {
    /// Times of the snapshots around the event, or around the largest of several.
    pub between: (u64, u64),
    /// Smallest and largest error due to the blend's profile, by when the event was.
    pub profile: (f64, f64),
}

/// Model of the movement and rounding of one system's snapshots, for each group of tensors.
pub(crate) struct ErrorModel<'a> {
    system: &'a System,
    updates: &'a Updates,
    groups: Vec<GroupModel<'a>>,
}

/// Movement and rounding of one group.
struct GroupModel<'a> {
    movement: GroupMovement<'a>,
    /// `C_ij`.
    rounding: Mat<f64>,
    share: f64,
}

/// Movement of one group, by the source that it is known from.
enum GroupMovement<'a> {
    /// The system's own snapshots.
    Fitted(Arc<MovementBasis<'a>>, Movement),
    /// Snapshots of another training.
    Like(Arc<LikeBasis<'a>>, Movement),
    /// The user.
    Named(NamedBasis<'a>),
}

impl GroupMovement<'_> {
    /// Returns the mean square of a blend of the parameters, with weights on the updates whose sum is 0.
    fn mean_square(&self, weights: &[f64]) -> f64 {
        match self {
            GroupMovement::Fitted(basis, movement) => basis.mean_square(movement, weights),
            GroupMovement::Like(basis, movement) => basis.mean_square(movement, weights),
            GroupMovement::Named(basis) => basis.mean_square(weights),
        }
    }
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
        let basis = Arc::new(MovementBasis::new(Cow::Borrowed(updates), &[]));
        let fit = |MeasuredGroup { measured, share }| {
            let movement = basis.fit(&measured);
            GroupModel { movement: GroupMovement::Fitted(basis.clone(), movement), rounding: measured.rounding, share }
        };
        let groups = groups.into_par_iter().map(fit).collect();
        Some(ErrorModel { system, updates, groups })
    }

    /// Creates the model of a training of `steps` steps that is expected to be like another one, of which all sources
    /// are measured.
    ///
    /// `None` if one of them has no history.
    pub(crate) fn like(
        (system, steps): (&'a System, u64),
        (other, other_steps): (&System, u64),
        groups: Vec<LikeGroup>,
    ) -> Option<ErrorModel<'a>> {
        let updates = system.updates()?;
        let basis = Arc::new(LikeBasis::new(updates, steps, other.updates()?, other_steps));
        let fit = |LikeGroup { group, ulps }| {
            let movement = basis.fit(&group.measured);
            let rounding = expected_rounding(&basis.distances(&movement), &ulps);
            GroupModel { movement: GroupMovement::Like(basis.clone(), movement), rounding, share: group.share }
        };
        let groups = groups.into_par_iter().map(fit).collect();
        Some(ErrorModel { system, updates, groups })
    }

    /// Creates the model of a training of `steps` steps with a movement that the user names; `None` without a history.
    pub(crate) fn named(
        (system, steps): (&'a System, u64),
        movement: &'a NamedMovement,
        ulps: &[(f64, f64)],
    ) -> Option<ErrorModel<'a>> {
        let updates = system.updates()?;
        let basis = NamedBasis::new(updates, movement, steps);
        let rounding = expected_rounding(&basis.distances(), ulps);
        let groups = vec![GroupModel { movement: GroupMovement::Named(basis), rounding, share: 1.0 }];
        Some(ErrorModel { system, updates, groups })
    }

    /// Returns the expected error of each group.
    fn expected_errors(&self, blend: &BlendSolution) -> Vec<ExpectedError> {
        let of_group = |group: &GroupModel<'_>| {
            let profile = group.movement.mean_square(&blend.residual);
            // Measured covariances need not be positive definite to the last digit.
            let rounding = quadratic_form(&group.rounding, &blend.solution.weights).max(0.0);
            ExpectedError { profile: profile.sqrt(), rounding: rounding.sqrt() }
        };
        self.groups.iter().map(of_group).collect()
    }

    /// Returns the range of the error of a blend over all elements, if an event makes the most of it.
    pub(crate) fn expected_event(&self, solved: &RegularisedSolution) -> Option<ExpectedEvent> {
        let (mut least, mut most, mut largest) = (0.0, 0.0, 0.0);
        let mut between = None;
        for (group, error) in self.groups.iter().zip(&solved.groups) {
            let square = error.profile.powi(2);
            let range = match &group.movement {
                GroupMovement::Fitted(basis, movement) => basis.event_range(movement, &solved.residual, square),
                GroupMovement::Like(..) | GroupMovement::Named(_) => None,
            };
            least += group.share * range.map_or(square, |range| range.least);
            most += group.share * range.map_or(square, |range| range.most);
            if let Some(range) = range.filter(|_| group.share * square > largest) {
                largest = group.share * square;
                between = Some(range.between);
            }
        }
        // Events in groups that matter little are not worth a word.
        let is_most = largest > 0.5 * solved.expected.profile.powi(2);
        let profile = (least.sqrt(), most.sqrt());
        between.filter(|_| is_most).map(|between| ExpectedEvent { between, profile })
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
