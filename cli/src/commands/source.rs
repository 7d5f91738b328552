//! Sources of plans: a run, or the forecast of a training.

use std::collections::BTreeMap;
use std::path::Path;

use posthoc_ema::math::Densities;
use posthoc_ema::{At, Dtype, Forecast, Noise, Plan, Profile, Run};

use super::Failure;
use super::forecast::{ExpectedMovement, ForecastArgs};
use super::open::OpenArgs;
use super::output::spinner;
use crate::pictures::Rounding;

/// A run on disk, or the forecast of a training.
pub enum PlanSource {
    /// Never closed: the end of the process gives back mappings faster than unmapping them one by one.
    Run(&'static Run),
    Forecast {
        forecast: Forecast,
        /// Dtype of stored snapshots.
        dtype: Dtype,
        /// Averaged elements of the model.
        parameters: Option<u64>,
        movement: ExpectedMovement,
    },
}

impl PlanSource {
    /// Opens the run that is named, or makes a forecast from the options of a training.
    pub fn open(run: Option<&Path>, open: &OpenArgs, forecast: &ForecastArgs) -> Result<PlanSource, Failure> {
        match (run, forecast.steps) {
            (Some(run), _) => Ok(PlanSource::Run(Box::leak(Box::new(open.open(run)?.0)))),
            (None, Some(steps)) => Ok(PlanSource::Forecast {
                forecast: forecast.forecast(steps)?,
                dtype: forecast.dtype(),
                parameters: forecast.parameters.map(|count| count.0),
                movement: forecast.movement(open)?,
            }),
            (None, None) => {
                Err(Failure::Usage("name the directory of a run, or give --steps to plan before training".into()))
            }
        }
    }

    /// Solves targets.
    pub fn plans(&self, targets: &[Profile], at: At, noise: Noise) -> Result<Vec<Plan>, Failure> {
        let spinner = spinner(format!("solving {} targets", targets.len()));
        let plans = match self {
            PlanSource::Run(run) => run.plans_with(targets, at, noise).map_err(Failure::from),
            PlanSource::Forecast { forecast, dtype, movement, .. } => {
                movement.plans(forecast, targets, at, noise, *dtype)
            }
        };
        spinner.finish_and_clear();
        plans
    }

    /// Returns the densities of a plan and its target over time.
    pub fn densities(&self, plan: &Plan) -> Result<Densities, Failure> {
        match self {
            PlanSource::Run(run) => Ok(run.densities(plan)?),
            PlanSource::Forecast { forecast, .. } => Ok(forecast.densities(plan)?),
        }
    }

    /// Returns the tracked profiles by their index.
    pub fn tracked(&self) -> BTreeMap<usize, Profile> {
        match self {
            PlanSource::Run(run) => {
                run.profiles().into_iter().map(|(index, profile)| (index, profile.clone())).collect()
            }
            PlanSource::Forecast { forecast, .. } => forecast.tracked.iter().cloned().enumerate().collect(),
        }
    }

    /// Returns the rounding of the snapshots.
    pub fn rounding(&self) -> Rounding {
        match self {
            PlanSource::Run(run) => Rounding::of_run(run),
            PlanSource::Forecast { dtype, .. } => Rounding::of_dtype(*dtype),
        }
    }

    /// Returns the bytes that a forecast run takes on disk at most, if the size of the model is known.
    pub fn disk(&self) -> Option<u64> {
        match self {
            PlanSource::Forecast { forecast, dtype, parameters, .. } => Some(forecast.disk((*parameters)?, *dtype)),
            PlanSource::Run(_) => None,
        }
    }

    /// Returns the title of a picture.
    pub fn title(&self) -> String {
        match self {
            PlanSource::Run(run) => {
                let name = run.dir().file_name().unwrap_or(run.dir().as_os_str());
                name.to_string_lossy().into_owned()
            }
            PlanSource::Forecast { forecast, .. } => {
                let every = forecast.schedule.checkpoint_every;
                format!("{} steps, a snapshot every {every}, {} kept", forecast.steps, forecast.keep)
            }
        }
    }
}

/// Returns the `sigma_rel` of a tracked profile at a time; for an exponential one, that of the same standard deviation.
pub fn length_at(profile: &Profile, at: u64) -> Option<f64> {
    profile.sigma_rel_at(at as f64)
}
