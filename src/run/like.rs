//! Plans of another training before it begins, with errors predicted from the movement of a run.

use super::Run;
use crate::error::{Error, Result, shown};
use crate::math::{ChainSource, Profile, System};
use crate::planning::{At, Forecast, LikeNoise, NoPrediction, Noise, Plan, solve};
use crate::tensor::Dtype;

impl Run {
    /// Solves targets of another training before it begins, with errors as if it moved like the training of this run.
    ///
    /// Both are taken to move equally far in all, by the same function of the share of the training that is over, and
    /// with equal noise at each update. This run is taken to be a whole training. `dtype` is that of the other
    /// training's snapshots. Errors are relative to the weights at the end.
    ///
    /// # Errors
    /// [`Error::Setting`] if this run does not show how its weights move, and as
    /// [`Forecast::plans_with`](crate::Forecast::plans_with).
    pub fn plans_like(
        &self,
        forecast: &Forecast,
        profiles: &[Profile],
        at: At,
        noise: Noise,
        dtype: Dtype,
    ) -> Result<Vec<Plan>> {
        let like = self.like_noise(forecast.steps, dtype)?;
        let (sources, history) = forecast.sources()?;
        solve(&sources, Some(&history), profiles, at, noise, Ok(&like))
    }

    /// Returns the movement of this run, for a training of `steps` steps with snapshots of a dtype.
    fn like_noise(&self, steps: u64, dtype: Dtype) -> Result<LikeNoise<'_>> {
        let unknown = |why: NoPrediction| Error::Setting {
            option: "like",
            reason: format!("{} does not show how its weights move: {why}", shown(&self.dir)),
        };
        let noise = self.stored_noise().map_err(unknown)?;
        let history = self.history.as_ref().ok_or_else(|| unknown(NoPrediction::NoHistory))?;
        let sources = self.sources();
        let inputs: Vec<ChainSource> = sources.iter().map(|source| source.to_chain_source()).collect();
        let run_steps = sources.iter().map(|source| source.step).max().unwrap_or(0);
        let system = System::new(history, run_steps, &inputs, 0.0)?;
        let like = LikeNoise { noise, system, sources, run_steps, steps, dtype };
        like.check().map_err(unknown)?;
        Ok(like)
    }
}
