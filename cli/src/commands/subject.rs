//! What commands plan on: a run, or a training that has not happened yet.

use std::collections::BTreeMap;
use std::path::Path;

use crate::report;
use posthoc_ema::math::{Densities, beta_to_sigma_rel};
use posthoc_ema::{At, Dtype, Forecast, Noise, Plan, Profile, Run};

use super::Failure;
use super::args::Before;
use super::list::Count;
use super::output::spinner;
use super::reading::Reading;
use super::targets::usage;

/// A run on disk, or a forecast and what its snapshots will be stored as.
pub enum Subject {
    /// Never closed: a process that ends gives mappings of which little was read back sooner than one after the other.
    Run(&'static Run),
    Forecast(Forecast, Dtype),
}

impl Subject {
    /// Opens the run that was named, or takes the flags of a training.
    pub fn open(run: Option<&Path>, reading: &Reading, before: &Before) -> Result<Subject, Failure> {
        match (run, before.steps) {
            (Some(run), _) => Ok(Subject::Run(Box::leak(Box::new(reading.open(run)?.0)))),
            (None, Some(steps)) => {
                let dtype = before.checkpoint_dtype.map_or(Dtype::F32, Dtype::from);
                Ok(Subject::Forecast(before.forecast(steps)?, dtype))
            }
            (None, None) => {
                Err(Failure::Usage("name the directory of a run, or give --steps to plan before training".into()))
            }
        }
    }

    /// Solves targets.
    pub fn plans(&self, targets: &[Profile], at: Option<u64>, noise: Noise) -> Result<Vec<Plan>, Failure> {
        let at = at.map_or(At::Latest, At::Step);
        let spinner = spinner(format!("solving {} targets", targets.len()));
        let plans = match self {
            Subject::Run(run) => run.plans_with(targets, at, noise).map_err(Failure::from),
            Subject::Forecast(forecast, _) => {
                rho_before(noise).and_then(|rho| forecast.plans_with(targets, at, rho).map_err(usage))
            }
        };
        spinner.finish_and_clear();
        plans
    }

    /// What a plan and its target weigh over time.
    pub fn densities(&self, plan: &Plan) -> Result<Densities, Failure> {
        match self {
            Subject::Run(run) => Ok(run.densities(plan)?),
            Subject::Forecast(forecast, _) => Ok(forecast.densities(plan)?),
        }
    }

    /// The tracked profiles, by their index.
    pub fn tracked(&self) -> BTreeMap<usize, Profile> {
        match self {
            Subject::Run(run) => run.profiles().into_iter().map(|(index, profile)| (index, profile.clone())).collect(),
            Subject::Forecast(forecast, _) => forecast.tracked.iter().cloned().enumerate().collect(),
        }
    }

    /// How the snapshots are rounded.
    pub fn rounding(&self) -> report::Rounding {
        match self {
            Subject::Run(run) => report::Rounding::of_run(run),
            Subject::Forecast(_, dtype) => report::Rounding::of(*dtype),
        }
    }

    /// What a training's run will take on disk at most, where the size of the model was given.
    pub fn disk(&self, before: &Before) -> Option<u64> {
        match (self, before.parameters) {
            (Subject::Forecast(forecast, dtype), Some(Count(parameters))) => Some(forecast.disk(parameters, *dtype)),
            _ => None,
        }
    }

    /// What a picture is of.
    pub fn title(&self) -> String {
        match self {
            Subject::Run(run) => {
                let name = run.dir().file_name().unwrap_or(run.dir().as_os_str());
                name.to_string_lossy().into_owned()
            }
            Subject::Forecast(forecast, _) => {
                let every = forecast.schedule.checkpoint_every;
                format!("{} steps, a snapshot every {every}, {} kept", forecast.steps, forecast.keep)
            }
        }
    }
}

/// The length that a tracked profile has at a time: its own, or that of about the same standard deviation.
pub fn length_at(profile: &Profile, at: u64) -> Option<f64> {
    profile.as_sigma_rel().or_else(|| profile.as_beta().map(|beta| beta_to_sigma_rel(beta, at as f64)))
}

/// The regularisation of a plan before training.
fn rho_before(noise: Noise) -> Result<f64, Failure> {
    match noise {
        Noise::Off => Ok(0.0),
        Noise::Rho(rho) => Ok(rho),
        Noise::Auto => {
            let why = "--noise auto looks at stored snapshots, and before training there are none: give a number";
            Err(Failure::Usage(why.into()))
        }
    }
}
