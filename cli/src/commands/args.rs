//! The command line as a whole, and the arguments that several commands share.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use posthoc_ema::{Device, Dtype, Noise};

use super::list::{Count, Kept, Numbers, Windows};
use super::{average, bench, error, import, inspect, plan, profile, sweep, synthesize, verify};

/// Averages of network weights of any length, chosen after training.
///
/// A run is a directory in which training stored snapshots of two or more running averages. From them an average of
/// any length is synthesized (post-hoc EMA, Karras et al. 2023, arXiv:2312.02696).
#[derive(Parser)]
#[command(name = "posthoc-ema", version, term_width = 100, disable_help_subcommand = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    Synthesize(synthesize::Arguments),
    Sweep(sweep::Arguments),
    Plan(plan::Arguments),
    Inspect(inspect::Arguments),
    Error(error::Arguments),
    Profile(profile::Arguments),
    Verify(verify::Arguments),
    Average(average::Arguments),
    Import(import::Arguments),
    Bench(bench::Arguments),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Profiles that one running average can track, in each of their parametrisations.
#[derive(Args)]
pub struct Families {
    /// Power-function profiles by relative standard deviation, above 0 and at most 0.288675
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    pub sigma_rel: Vec<Numbers>,
    /// Power-function profiles by exponent
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    pub gamma: Vec<Numbers>,
    /// Exponential profiles (classical EMA) by decay per step
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    pub beta: Vec<Numbers>,
    /// Exponential profiles by half-life in steps
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    pub half_life: Vec<Numbers>,
}

/// What is asked for.
#[derive(Args)]
#[command(next_help_heading = "Targets (in lists ... is an evenly spaced rest: 0.05,0.06,...,0.28)")]
pub struct Targets {
    #[command(flatten)]
    pub families: Families,
    /// Plain means over a window in steps, or in percent of the time: 5000,20%
    #[arg(long, value_name = "LIST")]
    pub uniform: Vec<Windows>,
    /// Linearly growing weights over a window
    #[arg(long, value_name = "LIST")]
    pub linear: Vec<Windows>,
    /// Stand-ins for learning-rate decay over a window; shapes: linear, cosine, 1-sqrt
    #[arg(long, value_name = "SHAPE:WINDOW", value_delimiter = ',')]
    pub lr_decay: Vec<String>,
    /// Profiles from two-column CSV files: time as a share of the whole, cumulative share
    #[arg(long, value_name = "FILE")]
    pub profile_csv: Vec<PathBuf>,
}

/// How averages are blended, and what they become.
#[derive(Args)]
pub struct Blending {
    /// Dtype of averaged tensors [default: the model's]
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Where to blend: auto (whichever is faster for the job), cpu, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
}

impl Blending {
    /// The dtype that was asked for.
    pub fn dtype(&self) -> Option<Dtype> {
        self.dtype.map(Dtype::from)
    }
}

/// What to do about the rounding of stored snapshots.
#[derive(Args)]
pub struct Rounding {
    /// Weigh the snapshots' rounding, too: off, auto (whatever regularisation has the smallest predicted error), or RHO
    #[arg(long, value_name = "off|auto|RHO", default_value = "off", allow_negative_numbers = true)]
    pub noise: Noise,
}

/// A training that has not happened yet
#[derive(Args)]
#[command(next_help_heading = "Before training (instead of RUN)")]
pub struct Before {
    /// Length of the training in steps
    #[arg(long, value_name = "N", conflicts_with = "run")]
    pub steps: Option<u64>,
    /// Steps between updates
    #[arg(long, value_name = "N", default_value_t = 10, conflicts_with = "run")]
    pub update_every: u64,
    /// No update before this step
    #[arg(long, value_name = "STEP", default_value_t = 0, conflicts_with = "run")]
    pub update_after_step: u64,
    /// Steps between snapshots
    #[arg(long, value_name = "N", default_value_t = 1000, conflicts_with = "run")]
    pub checkpoint_every: u64,
    /// How many steps' snapshots are kept
    #[arg(long, value_name = "N", default_value_t = 20, conflicts_with = "run")]
    pub keep: usize,
    /// Which ones: those that serve a range of lengths (sigma_rel) best, `latest`, or for each step of a list the first at or
    /// after it
    #[arg(long, value_name = "FROM..TO", default_value = "0.05..0.28", conflicts_with = "run")]
    pub retention: Kept,
    /// Averaged elements of the model, such as 7B: tells what the run takes on disk
    #[arg(long, value_name = "N", conflicts_with = "run")]
    pub parameters: Option<Count>,
    /// Tracked power-function profiles by relative standard deviation [default: 0.05,0.28]
    #[arg(long, conflicts_with = "run", value_name = "LIST", allow_negative_numbers = true)]
    pub track: Vec<Numbers>,
    /// Tracked exponential profiles by decay per step
    #[arg(long, conflicts_with = "run", value_name = "LIST", allow_negative_numbers = true)]
    pub track_beta: Vec<Numbers>,
    /// What snapshots are stored as [default: f32]
    #[arg(long, value_name = "DTYPE", conflicts_with = "run")]
    pub checkpoint_dtype: Option<DtypeName>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum DtypeName {
    F32,
    F16,
    Bf16,
    F64,
}

impl From<DtypeName> for Dtype {
    fn from(name: DtypeName) -> Dtype {
        match name {
            DtypeName::F32 => Dtype::F32,
            DtypeName::F16 => Dtype::F16,
            DtypeName::Bf16 => Dtype::BF16,
            DtypeName::F64 => Dtype::F64,
        }
    }
}
