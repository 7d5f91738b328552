//! `posthoc-ema plan`.

use std::path::PathBuf;

use clap::Args;
use posthoc_ema::report;

use super::args::{Before, Rounding, Targets};
use super::output::{print, print_json};
use super::{Outcome, targets};

/// Show the weights, error and noise gain of targets, on a run or before training
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    pub run: Option<PathBuf>,
    /// Time of the targets [default: the newest snapshot]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub rounding: Rounding,
    #[command(flatten)]
    pub targets: Targets,
    #[command(flatten)]
    pub before: Before,
}

/// Solves targets and shows what they will be like; a single one with its weights.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles = arguments.targets.profiles()?;
    let plans =
        targets::plans(arguments.run.as_deref(), &arguments.before, &profiles, arguments.at, arguments.rounding.noise)?;
    if arguments.json {
        print_json(&serde_json::json!({ "targets": plans }));
        return Ok(());
    }
    print(&report::plans(&plans).to_string());
    if let [plan] = plans.as_slice() {
        print(&report::weights(plan).to_string());
    }
    Ok(())
}
