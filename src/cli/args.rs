//! The arguments of every command.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use posthoc_ema::bench::Options;
use posthoc_ema::{Device, Tool};

use super::list::{Numbers, Windows};

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
    Synthesize(Synthesize),
    Plan(Plan),
    Inspect(Inspect),
    Error(ErrorOver),
    Profile(Profile),
    Verify(Verify),
    Import(Import),
    Bench(Bench),
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
    /// How many steps' snapshots are kept, the newest
    #[arg(long, value_name = "N", default_value_t = 20, conflicts_with = "run")]
    pub keep: usize,
    /// Tracked power-function profiles by relative standard deviation [default: 0.05,0.28]
    #[arg(long, conflicts_with = "run", value_name = "LIST", allow_negative_numbers = true)]
    pub track: Vec<Numbers>,
    /// Tracked exponential profiles by decay per step
    #[arg(long, conflicts_with = "run", value_name = "LIST", allow_negative_numbers = true)]
    pub track_beta: Vec<Numbers>,
}

/// Synthesize averages from a run's snapshots
///
/// Up to 256 targets are synthesized in one pass over the snapshots. Files appear whole or not at all.
#[derive(Args)]
pub struct Synthesize {
    /// Directory of the run
    pub run: PathBuf,
    /// Time of the targets [default: the newest snapshot]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
    /// Write the only target to this file
    #[arg(short, long, value_name = "FILE", conflicts_with = "out_dir")]
    pub output: Option<PathBuf>,
    /// Write each target to a file of its own in this directory, which is made where it is missing
    #[arg(long, value_name = "DIR")]
    pub out_dir: Option<PathBuf>,
    /// Dtype of averaged tensors [default: the model's]
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Where to blend: auto (whichever is faster for the job), cpu, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub targets: Targets,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum DtypeName {
    F32,
    F16,
    Bf16,
    F64,
}

/// Show the weights, error and noise gain of targets, on a run or before training
#[derive(Args)]
pub struct Plan {
    /// Directory of the run
    pub run: Option<PathBuf>,
    /// Time of the targets [default: the newest snapshot]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub targets: Targets,
    #[command(flatten)]
    pub before: Before,
}

/// Show a run's snapshots, profiles, sizes and health
#[derive(Args)]
pub struct Inspect {
    /// Directory of the run
    pub run: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Show the reconstruction error over the length of the average, of a run or before training
#[derive(Args)]
pub struct ErrorOver {
    /// Directory of the run
    pub run: Option<PathBuf>,
    /// Lengths by relative standard deviation
    #[arg(long, value_name = "LIST", default_value = "0.02,0.03,...,0.28", allow_negative_numbers = true)]
    pub sigma_rel: Vec<Numbers>,
    /// Time of the targets [default: the newest snapshot]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub before: Before,
}

/// Convert between the parametrisations of profiles
#[derive(Args)]
pub struct Profile {
    #[command(flatten)]
    pub families: Families,
    /// Training length at which the two families are compared
    #[arg(long, value_name = "T")]
    pub steps: Option<u64>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Read every file of a run and check its checksum
#[derive(Args)]
pub struct Verify {
    /// Directory of the run
    pub run: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Write another tool's checkpoints as a run
///
/// pytorch-posthoc-ema, ema-pytorch and nitrous-ema apply a step's decay once every --update-every steps, and then
/// synthesize as if they had applied it at every step. Their averages are sound, but of other profiles than asked for: the
/// run tells which, so that a synthesis from it gives the lengths that theirs should have given. The checkpoints are only
/// read, and no code is ever run. The options say what the training used: the files do not tell.
#[derive(Args)]
pub struct Import {
    /// Directory of the checkpoints (INDEX.STEP.pt)
    pub dir: PathBuf,
    /// Directory of the run: an empty or a new one
    pub run: PathBuf,
    /// The tool that wrote them
    #[arg(long, value_enum, value_name = "TOOL")]
    pub from: ToolName,
    /// Profiles that it tracked, in its order, by relative standard deviation
    #[arg(long, value_name = "LIST", allow_negative_numbers = true, required_unless_present = "gammas")]
    pub sigma_rels: Option<Numbers>,
    /// The same by exponent
    #[arg(long, value_name = "LIST", allow_negative_numbers = true, conflicts_with = "sigma_rels")]
    pub gammas: Option<Numbers>,
    /// Its steps between updates (the default of pytorch-posthoc-ema is 10, that of the others 100)
    #[arg(long, value_name = "N")]
    pub update_every: u64,
    /// No update before this step [default: 100 for pytorch-posthoc-ema, as there; give 0 for its versions 1.0.6 and 1.0.7,
    /// which have no such option]
    #[arg(long, value_name = "STEP")]
    pub update_after_step: Option<u64>,
    /// nitrous-ema was made with step_size_correction=True
    #[arg(long)]
    pub step_size_correction: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum ToolName {
    PytorchPosthocEma,
    EmaPytorch,
    NitrousEma,
}

impl From<ToolName> for Tool {
    fn from(name: ToolName) -> Tool {
        match name {
            ToolName::PytorchPosthocEma => Tool::PytorchPosthocEma,
            ToolName::EmaPytorch => Tool::EmaPytorch,
            ToolName::NitrousEma => Tool::NitrousEma,
        }
    }
}

/// Measure update and blend on this machine, beside the machine's limits
///
/// Every piece of work is compared with a loop that moves the same bytes and does next to nothing else, timed in turns
/// with it; on a GPU with a copy within it, or over the bus. Answers are checked before anything is timed. The
/// snapshots that the CPU blends lie in a temporary file.
#[derive(Args)]
pub struct Bench {
    /// Parameters of the model [default: 20 million on the CPU, 200 million, or what fits, on a GPU]
    #[arg(long, value_name = "N")]
    pub parameters: Option<usize>,
    /// Tensors of the model that has many small ones
    #[arg(long, value_name = "N", default_value_t = Options::default().tensors)]
    pub tensors: usize,
    /// Snapshots that are blended
    #[arg(long, value_name = "N", default_value_t = Options::default().snapshots)]
    pub snapshots: usize,
    /// Targets that they are blended into in one pass, beside a pass for one
    #[arg(long, value_name = "N", default_value_t = Options::default().targets)]
    pub targets: usize,
    /// How often each piece of work is timed; medians are shown
    #[arg(long, value_name = "N", default_value_t = Options::default().repeats)]
    pub repeats: usize,
    /// Where: auto (the CPU and every CUDA device), cpu, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = Options::default().device)]
    pub device: Device,
    /// Draw the rates and their limits
    #[arg(long, value_name = "FILE.svg", value_parser = svg)]
    pub plot: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// The path of a picture, which tells its format.
fn svg(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let known = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
    if known { Ok(path) } else { Err("plots are SVG: name a file that ends in .svg".into()) }
}
