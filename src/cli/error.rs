//! `posthoc-ema error`.

use std::path::PathBuf;

use clap::Args;
use posthoc_ema::{Plan, Profile, report};

use super::args::{Before, Rounding};
use super::list::Numbers;
use super::output::{print, print_json};
use super::{Failure, Outcome, targets};

/// Show the reconstruction error over the length of the average, of a run or before training
#[derive(Args)]
pub struct Arguments {
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
    pub rounding: Rounding,
    #[command(flatten)]
    pub before: Before,
}

/// Shows the reconstruction error over the length of the average.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles: Vec<Profile> =
        targets::profiles(&arguments.sigma_rel, Profile::sigma_rel).collect::<Result<_, Failure>>()?;
    let plans =
        targets::plans(arguments.run.as_deref(), &arguments.before, &profiles, arguments.at, arguments.rounding.noise)?;
    if arguments.json {
        let errors = targets::numbers(&arguments.sigma_rel).zip(&plans).map(point);
        print_json(&serde_json::json!({ "errors": errors.collect::<Vec<_>>() }));
    } else {
        print(&report::errors(&plans).to_string());
    }
    Ok(())
}

fn point((sigma_rel, plan): (f64, &Plan)) -> serde_json::Value {
    serde_json::json!({
        "sigma_rel": sigma_rel,
        "at": plan.at,
        "relative_error": plan.relative_error,
        "noise_gain": plan.noise_gain,
        "rho": plan.rho,
        "predicted": plan.predicted,
    })
}
