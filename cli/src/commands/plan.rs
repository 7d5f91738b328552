//! `posthoc-ema plan`.

use std::path::PathBuf;

use crate::report::{self, MAX_PANELS, ProfilePanel, Profiles};
use clap::Args;
use posthoc_ema::{Plan, Profile};

use super::args::{Before, Rounding, Targets};
use super::list::Count;
use super::output::{bytes, print, print_json};
use super::picture::Plot;
use super::reading::Reading;
use super::subject::Subject;
use super::{Failure, Outcome, advise};

/// Show the weights, error and noise gain of targets, on a run or before training
///
/// A picture shows each target's profile over the training, that of the blend, their difference, and the snapshots'
/// weights. --advise, with --steps, --parameters, --disk and a range of lengths (--retention), tells which profiles,
/// spacing and number of snapshots make the worst error over the range smallest.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    pub run: Option<PathBuf>,
    /// Time of the targets [default: the newest snapshot]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
    /// Instead of targets: which profiles to track, how often to store and how many to keep
    #[arg(long, requires = "disk", conflicts_with_all = ["run", "plot", "at", "noise", "keep", "checkpoint_every", "track", "track_beta",
        "sigma_rel", "gamma", "beta", "half_life", "uniform", "linear", "lr_decay", "profile_csv"])]
    pub advise: bool,
    /// What the run may take on disk, such as 100GB
    #[arg(long, value_name = "BYTES", requires = "advise")]
    pub disk: Option<Count>,
    #[command(flatten)]
    pub plot: Plot,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub reading: Reading,
    #[command(flatten)]
    pub rounding: Rounding,
    #[command(flatten)]
    pub targets: Targets,
    #[command(flatten)]
    pub before: Before,
}

/// Solves targets and shows what they will be like; a single one with its weights.
pub fn run(arguments: &Arguments) -> Outcome {
    if let (true, Some(disk)) = (arguments.advise, arguments.disk) {
        return advise::run(&arguments.before, disk, arguments.json);
    }
    let profiles = arguments.targets.profiles()?;
    if !arguments.plot.is_empty() && profiles.len() > MAX_PANELS {
        let why = format!("--plot shows at most {MAX_PANELS} targets, not {}: name fewer", profiles.len());
        return Err(Failure::Usage(why));
    }
    let subject = Subject::open(arguments.run.as_deref(), &arguments.reading, &arguments.before)?;
    let plans = subject.plans(&profiles, arguments.at, arguments.rounding.noise)?;
    if arguments.json {
        let disk = subject.disk(&arguments.before);
        let disk = disk.map(|disk| ("disk".to_owned(), serde_json::json!(disk)));
        let targets = ("targets".to_owned(), serde_json::json!(plans));
        print_json(&[targets].into_iter().chain(disk).collect());
    } else {
        print(&report::plans(&plans).to_string());
        if let [plan] = plans.as_slice() {
            print(&report::weights(plan).to_string());
        }
        if let Some(disk) = subject.disk(&arguments.before) {
            print(&format!("The run takes at most {} on disk, its live state included.", bytes(disk)));
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
    Ok(plot.draw(|path| report::profiles(path, &picture))?)
}
