//! Options that describe a training before it runs.

use std::path::PathBuf;

use clap::Args;
use posthoc_ema::math::{SNAPSHOT_GROWTH, Schedule};
use posthoc_ema::{At, Dtype, Forecast, NamedMovement, Noise, Plan, Profile, Run};

use super::Failure;
use super::args::DtypeName;
use super::list::{Count, Numbers, RetentionArg};
use super::open::OpenArgs;
use super::targets::profiles;

/// A training that has not happened yet
#[derive(Args)]
#[command(next_help_heading = "Before training (instead of RUN)")]
pub struct ForecastArgs {
    /// Length of the training in steps
    #[arg(long, value_name = "N", conflicts_with = "run")]
    pub steps: Option<u64>,
    /// Steps between updates
    #[arg(long, value_name = "N", default_value_t = 10, conflicts_with = "run")]
    update_every: u64,
    /// No update before this step
    #[arg(long, value_name = "STEP", default_value_t = 0, conflicts_with = "run")]
    update_after_step: u64,
    /// Steps between snapshots
    #[arg(long, value_name = "N", default_value_t = 1000, conflicts_with = "run")]
    checkpoint_every: u64,
    /// Factor between the times of further snapshots early in the training; 0 for none
    #[arg(long, value_name = "FACTOR", default_value_t = SNAPSHOT_GROWTH, conflicts_with = "run")]
    snapshot_growth: f64,
    /// Steps whose snapshots are kept
    #[arg(long, value_name = "N", default_value_t = 20, conflicts_with = "run")]
    keep: usize,
    /// Snapshots that are kept: those that serve a range of lengths (sigma_rel) best, `latest`, or for each step of a
    /// list the first at or after it
    #[arg(long, value_name = "FROM..TO", default_value = "0.05..0.28", conflicts_with = "run")]
    pub retention: RetentionArg,
    /// Averaged elements of the model, such as 7B: the size of the run on disk follows from them
    #[arg(long, value_name = "N", conflicts_with = "run")]
    pub parameters: Option<Count>,
    /// Tracked power-function profiles by relative standard deviation [default: 0.05,0.28]
    #[arg(long, conflicts_with = "run", value_name = "LIST", allow_negative_numbers = true)]
    track: Vec<Numbers>,
    /// Tracked exponential profiles by decay per step
    #[arg(long, conflicts_with = "run", value_name = "LIST", allow_negative_numbers = true)]
    track_beta: Vec<Numbers>,
    /// Dtype of stored snapshots [default: f32]
    #[arg(long, value_name = "DTYPE", conflicts_with = "run")]
    checkpoint_dtype: Option<DtypeName>,
    /// Movement of the weights, to predict errors from: walk, cosine, line, converge, noise, each with its size
    /// relative to the weights [default: 1], and sums of them, such as walk:0.3+noise:0.01
    #[arg(long, value_name = "KIND:SIZE", conflicts_with_all = ["run", "like"])]
    movement: Option<NamedMovement>,
    /// Run of another training, to predict errors as if the weights moved as there
    #[arg(long, value_name = "RUN", conflicts_with = "run")]
    like: Option<PathBuf>,
}

/// Movement of the weights in a training that has not happened yet.
pub enum ExpectedMovement {
    Unknown,
    Named(NamedMovement),
    Like(&'static Run),
}

impl ExpectedMovement {
    /// Solves targets of a forecast, and predicts their errors if the movement is known.
    pub fn plans(
        &self,
        forecast: &Forecast,
        targets: &[Profile],
        at: At,
        noise: Noise,
        dtype: Dtype,
    ) -> Result<Vec<Plan>, Failure> {
        match self {
            ExpectedMovement::Unknown => forecast.plans_with(targets, at, fixed_rho(noise)?),
            ExpectedMovement::Named(movement) => forecast.plans_moving(targets, at, noise, movement, dtype),
            ExpectedMovement::Like(run) => run.plans_like(forecast, targets, at, noise, dtype),
        }
        .map_err(Failure::of_argument)
    }
}

/// Returns the regularisation of a plan before training.
fn fixed_rho(noise: Noise) -> Result<f64, Failure> {
    match noise {
        Noise::Off => Ok(0.0),
        Noise::Rho(rho) => Ok(rho),
        Noise::Auto => {
            let why = "--noise auto needs to know how the weights move: name it with --movement, name a run like it \
                       with --like, or give a number";
            Err(Failure::Usage(why.into()))
        }
    }
}

impl ForecastArgs {
    /// Returns the forecast of a training of `steps` steps.
    pub fn forecast(&self, steps: u64) -> Result<Forecast, Failure> {
        let tracked = profiles(&self.track, Profile::sigma_rel).chain(profiles(&self.track_beta, Profile::beta));
        let mut tracked: Vec<Profile> = tracked.collect::<Result<_, _>>()?;
        if tracked.is_empty() {
            tracked = [0.05, 0.28].map(Profile::sigma_rel).into_iter().collect::<Result<_, _>>()?;
        }
        let schedule = self.schedule();
        Ok(Forecast { schedule, steps, keep: self.keep, retention: self.retention.0.clone(), tracked })
    }

    pub fn schedule(&self) -> Schedule {
        Schedule {
            update_every: self.update_every,
            update_after_step: self.update_after_step,
            checkpoint_every: self.checkpoint_every,
            snapshot_growth: Some(self.snapshot_growth).filter(|factor| *factor != 0.0),
        }
    }

    /// Returns the movement of the weights, as far as it is known. A run is never closed.
    pub fn movement(&self, open: &OpenArgs) -> Result<ExpectedMovement, Failure> {
        match (&self.movement, &self.like) {
            (Some(movement), _) => Ok(ExpectedMovement::Named(movement.clone())),
            (None, Some(run)) => Ok(ExpectedMovement::Like(Box::leak(Box::new(open.open(run)?.0)))),
            (None, None) => Ok(ExpectedMovement::Unknown),
        }
    }

    /// Returns the dtype of stored snapshots.
    pub fn dtype(&self) -> Dtype {
        self.checkpoint_dtype.map_or(Dtype::F32, Dtype::from)
    }
}
