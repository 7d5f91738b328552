//! `posthoc-ema plan`.

use std::path::PathBuf;

use clap::Args;
use posthoc_ema::report::{self, MAX_PANELS, ProfilePanel, Profiles};
use posthoc_ema::{Plan, Profile};

use super::args::{Before, Targets};
use super::output::{print, print_json};
use super::picture::Plot;
use super::subject::Subject;
use super::{Failure, Outcome};

/// Show the weights, error and noise gain of targets, on a run or before training
///
/// A picture shows each target's profile over the training, that of the blend, their difference, and the snapshots'
/// weights.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    pub run: Option<PathBuf>,
    /// Time of the targets [default: the newest snapshot]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
    #[command(flatten)]
    pub plot: Plot,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub targets: Targets,
    #[command(flatten)]
    pub before: Before,
}

/// Solves targets and shows what they will be like; a single one with its weights.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles = arguments.targets.profiles()?;
    if !arguments.plot.is_empty() && profiles.len() > MAX_PANELS {
        let why = format!("--plot shows at most {MAX_PANELS} targets, not {}: name fewer", profiles.len());
        return Err(Failure::Usage(why));
    }
    let subject = Subject::open(arguments.run.as_deref(), &arguments.before)?;
    let plans = subject.plans(&profiles, arguments.at)?;
    if arguments.json {
        print_json(&serde_json::json!({ "targets": plans }));
    } else {
        print(&report::plans(&plans).to_string());
        if let [plan] = plans.as_slice() {
            print(&report::weights(plan).to_string());
        }
    }
    if arguments.plot.is_empty() { Ok(()) } else { draw(&arguments.plot, &subject, &plans) }
}

fn draw(plot: &Plot, subject: &Subject, plans: &[Plan]) -> Outcome {
    let panel = |plan| Ok(ProfilePanel { plan, densities: subject.densities(plan)? });
    let name = |(index, profile): (usize, Profile)| (index, profile.to_string());
    let picture = Profiles {
        panels: plans.iter().map(panel).collect::<Result<_, Failure>>()?,
        tracked: subject.tracked().into_iter().map(name).collect(),
        rounding: Some(subject.rounding()),
    };
    plot.draw(|path| report::profiles(path, &picture))
}
