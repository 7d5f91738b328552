//! Movement and rounding that are expected of a training before it begins.

use std::f64::consts::PI;

use super::no_prediction::NoPrediction;
use super::sample::ulp;
use super::source::IndexedSource;
use super::stored_noise::{ErrorSource, RelativeErrorModel, RelativeGroup, SnapshotNoise};
use crate::math::System;
use crate::math::noise::{ErrorModel, NamedMovement};
use crate::tensor::Dtype;

/// Movement as in a run of another training.
pub(crate) struct LikeNoise<'a> {
    /// Measurements of the run.
    pub noise: &'a SnapshotNoise,
    /// The system of all sources of the run.
    pub system: System,
    pub sources: Vec<IndexedSource>,
    /// The length of the run's training in steps.
    pub run_steps: u64,
    /// The length of the new training in steps.
    pub steps: u64,
    /// The dtype of the new training's snapshots.
    pub dtype: Dtype,
}

impl LikeNoise<'_> {
    /// Returns the groups of the run, and the size of its weights.
    ///
    /// # Errors
    /// [`NoPrediction`] if the run does not show how its weights move.
    pub(crate) fn check(&self) -> Result<(), NoPrediction> {
        self.groups().map(drop)
    }

    fn groups(&self) -> Result<(Vec<RelativeGroup<'_>>, f64), NoPrediction> {
        self.noise.relative_groups(&self.sources, &(0..self.sources.len()).collect::<Vec<_>>())
    }
}

impl ErrorSource for LikeNoise<'_> {
    fn model<'a>(
        &'a self,
        system: &'a System,
        _: &[IndexedSource],
        _: &[usize],
    ) -> Result<RelativeErrorModel<'a>, NoPrediction> {
        let (groups, size) = self.groups()?;
        let like = self.noise.like_groups(self.dtype);
        let model = ErrorModel::like((system, self.steps), (&self.system, self.run_steps), like);
        Ok(RelativeErrorModel { model: model.ok_or(NoPrediction::NoHistory)?, groups, size })
    }
}

/// Movement that the user names.
pub(crate) struct NamedNoise<'a> {
    pub movement: &'a NamedMovement,
    /// The length of the training in steps.
    pub steps: u64,
    /// The dtype of the training's snapshots.
    pub dtype: Dtype,
}

impl ErrorSource for NamedNoise<'_> {
    fn model<'a>(
        &'a self,
        system: &'a System,
        _: &[IndexedSource],
        _: &[usize],
    ) -> Result<RelativeErrorModel<'a>, NoPrediction> {
        let model = ErrorModel::named((system, self.steps), self.movement, &gaussian_ulps(self.dtype));
        let model = model.ok_or(NoPrediction::NoHistory)?;
        let groups = vec![RelativeGroup { tensors: &[], share: 1.0, size: 1.0, is_seen: true }];
        Ok(RelativeErrorModel { model, groups, size: 1.0 })
    }
}

/// Returns the distances of neighbouring values of Gaussian weights of size 1, each with its share of the weights.
fn gaussian_ulps(dtype: Dtype) -> Vec<(f64, f64)> {
    let density = |x: f64| (-0.5 * x * x).exp() * (2.0 / PI).sqrt();
    let of_octave = |exponent: i32| {
        let start = 2f64.powi(exponent);
        // Midpoints: exact to four digits.
        let share = (0..64).map(|i| density(start * (1.0 + (f64::from(i) + 0.5) / 64.0)) * start / 64.0).sum();
        (ulp(dtype, start), share)
    };
    (-20..4).map(of_octave).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaussian_weights_have_all_shares() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let ulps = gaussian_ulps(dtype);
            assert!((ulps.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-4);
            let rounding = ulps.iter().map(|(ulp, share)| share * ulp * ulp / 12.0).sum::<f64>().sqrt();
            let relative = crate::planning::rounding(dtype);
            assert!((rounding / relative - 1.0).abs() < 0.15, "{dtype:?}: {rounding} is not about {relative}");
        }
    }
}
