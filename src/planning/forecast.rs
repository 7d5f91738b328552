//! Plans before training, for a schedule of updates and snapshots.

use super::expected_noise::NamedNoise;
use super::no_prediction::NoPrediction;
use super::noise::Noise;
use super::plan::{At, Plan, solve};
use super::source::IndexedSource;
use crate::error::{Error, Result};
use crate::math::noise::NamedMovement;
use crate::math::{Chain, History, Profile, Retention, Schedule};
use crate::tensor::Dtype;

/// The settings of a training before it begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// The schedule of updates and snapshots.
    pub schedule: Schedule,
    /// The length of the training in steps.
    pub steps: u64,
    /// Number of steps whose snapshots will be kept.
    pub keep: usize,
    /// The rule for the steps to keep.
    pub retention: Retention,
    /// The profiles that will be tracked.
    pub tracked: Vec<Profile>,
}

impl Forecast {
    /// Solves targets over the snapshots that the training will leave.
    ///
    /// # Errors
    /// [`Error::Setting`] for a schedule that leaves no snapshot, [`Error::NotTrackable`] for a tracked profile that
    /// cannot be tracked, and the errors of the solve.
    pub fn plans(&self, profiles: &[Profile], at: At) -> Result<Vec<Plan>> {
        self.plans_with(profiles, at, 0.0)
    }

    /// Solves as [`Forecast::plans`], with a regularisation: [`Noise::Rho`].
    ///
    /// # Errors
    /// As [`Forecast::plans`], and [`Error::Parameter`] for a `rho` that is negative, infinite or NaN.
    pub fn plans_with(&self, profiles: &[Profile], at: At, rho: f64) -> Result<Vec<Plan>> {
        let (sources, history) = self.sources()?;
        solve(&sources, Some(&history), profiles, at, Noise::Rho(rho), Err(NoPrediction::BeforeTraining))
    }

    /// Solves targets, and predicts their errors for a movement that is expected of the weights.
    ///
    /// `dtype` is that of the snapshots. The weights are taken to be Gaussian, for their rounding.
    ///
    /// # Errors
    /// As [`Forecast::plans_with`].
    pub fn plans_moving(
        &self,
        profiles: &[Profile],
        at: At,
        noise: Noise,
        movement: &NamedMovement,
        dtype: Dtype,
    ) -> Result<Vec<Plan>> {
        let (sources, history) = self.sources()?;
        let movement = NamedNoise { movement, steps: self.steps, dtype };
        solve(&sources, Some(&history), profiles, at, noise, Ok(&movement))
    }

    /// Returns the snapshots that the training will leave, and its updates.
    pub(crate) fn sources(&self) -> Result<(Vec<IndexedSource>, History)> {
        self.schedule.check()?;
        if let Some(profile) = self.tracked.iter().find(|profile| !profile.is_trackable()) {
            return Err(Error::NotTrackable { profile: profile.to_string() });
        }
        let history = self.schedule.updates(self.steps)?;
        let kept = self.kept(&history, |_| ())?;
        Ok((self.sources_at(&kept), history))
    }

    /// Returns the snapshots at some steps.
    pub(super) fn sources_at(&self, kept: &[u64]) -> Vec<IndexedSource> {
        let mut sources = Vec::with_capacity(self.tracked.len() * kept.len());
        for (index, profile) in self.tracked.iter().enumerate() {
            for &step in kept {
                let chain = Chain::Tracked(profile.clone());
                sources.push(IndexedSource {
                    index,
                    step,
                    chain,
                    extensions: 0,
                    label: format!("the snapshot of {profile} at step {step}"),
                });
            }
        }
        sources
    }

    /// Returns the steps whose snapshots the training will leave, by applying retention after each snapshot.
    ///
    /// `look` is called with the kept steps after each snapshot.
    pub(super) fn kept(&self, history: &History, look: impl FnMut(&[u64])) -> Result<Vec<u64>> {
        self.retention.check()?;
        let first = history.first().unwrap_or(1);
        let snapshots = if self.keep > 0 { self.schedule.snapshots(self.steps) } else { Vec::new() };
        let kept = self.retention.over_training(&self.tracked, first, &snapshots, self.keep, look);
        if kept.is_empty() {
            let reason =
                format!("no snapshot is left after {} steps: store snapshots sooner, and keep at least 1", self.steps);
            return Err(Error::Setting { option: "checkpoint_every", reason });
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forecast(keep: usize) -> Forecast {
        let tracked = [0.05, 0.28].map(|s| Profile::sigma_rel(s).unwrap()).to_vec();
        Forecast { schedule: Schedule::default(), steps: 1_000_000, keep, retention: Retention::Latest, tracked }
    }

    #[test]
    fn newest_twenty_have_an_error_of_41_percent_in_the_middle() {
        let plans = forecast(20).plans(&[Profile::sigma_rel(0.15).unwrap()], At::Latest).unwrap();
        assert_eq!(plans[0].weights.len(), 40);
        assert!((plans[0].relative_error - 0.41).abs() < 0.005, "{}", plans[0].relative_error);
    }

    #[test]
    fn twenty_kept_for_a_range_have_an_error_below_one_percent() {
        let forecast = Forecast { retention: Retention::default(), ..forecast(20) };
        let plans = forecast.plans(&[Profile::sigma_rel(0.15).unwrap()], At::Latest).unwrap();
        assert_eq!((plans[0].weights.len(), plans[0].weights[39].step), (40, 1_000_000));
        assert!(plans[0].relative_error < 0.0095, "{}", plans[0].relative_error);
    }

    #[test]
    fn training_without_snapshots_is_an_error() {
        let profile = [Profile::sigma_rel(0.15).unwrap()];
        assert!(forecast(0).plans(&profile, At::Latest).unwrap_err().to_string().contains("keep at least 1"));
        let short = Forecast { steps: 99, ..forecast(20) };
        assert!(short.plans(&profile, At::Latest).unwrap_err().to_string().contains("after 99 steps"));
        let schedule = Schedule { snapshot_growth: None, ..Schedule::default() };
        let short = Forecast { steps: 999, schedule, ..forecast(20) };
        assert!(short.plans(&profile, At::Latest).unwrap_err().to_string().contains("after 999 steps"));
    }
}
