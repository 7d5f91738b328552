//! `posthoc-ema plan`.

use std::path::PathBuf;

use clap::Args;
use posthoc_ema::Plan;
use serde_json::json;

use super::args::{AtArgs, NoiseArgs};
use super::forecast::ForecastArgs;
use super::list::Count;
use super::open::OpenArgs;
use super::output::{bytes, print, print_json, print_notes, print_warnings};
use super::plot::PlotArgs;
use super::source::PlanSource;
use super::targets::TargetArgs;
use super::{Failure, Outcome, advise};
use crate::pictures::{self, MAX_PANELS, ProfilePanel, Profiles};
use crate::tables;

/// Show the weights, error and noise gain of targets, on a run or before training
///
/// A picture shows each target's profile over the training, that of the blend, their difference, and the snapshots'
/// weights. --advise, with --steps, --parameters, --disk and a range of lengths (--retention), finds the profiles,
/// spacing and number of snapshots that make the worst error over the range smallest. With --movement or --like, plans
/// before training predict the error of the weights.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    run: Option<PathBuf>,
    #[command(flatten)]
    at: AtArgs,
    /// Instead of targets: which profiles to track, how often to store and how many to keep
    #[arg(long, requires = "disk", conflicts_with_all = [
        "run", "plot", "at", "noise", "keep", "checkpoint_every", "track", "track_beta",
        "sigma_rel", "gamma", "beta", "half_life", "uniform", "linear", "lr_decay", "profile_csv",
    ])]
    advise: bool,
    /// Disk space for the run, such as 100GB
    #[arg(long, value_name = "BYTES", requires = "advise")]
    disk: Option<Count>,
    #[command(flatten)]
    plot: PlotArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    noise: NoiseArgs,
    #[command(flatten)]
    targets: TargetArgs,
    #[command(flatten)]
    forecast: ForecastArgs,
}

/// Solves targets and shows their errors; a single one with its weights.
pub fn run(arguments: &Arguments) -> Outcome {
    if let (true, Some(disk)) = (arguments.advise, arguments.disk) {
        return advise::run(&arguments.forecast, &arguments.open, disk, arguments.json);
    }
    let profiles = arguments.targets.profiles()?;
    if !arguments.plot.is_empty() && profiles.len() > MAX_PANELS {
        let why = format!("--plot shows at most {MAX_PANELS} targets, not {}: name fewer", profiles.len());
        return Err(Failure::Usage(why));
    }
    arguments.plot.check()?;
    let source = PlanSource::open(arguments.run.as_deref(), &arguments.open, &arguments.forecast)?;
    let plans = source.plans(&profiles, arguments.at.at(), arguments.noise.noise)?;
    print_warnings(&plans);
    let disk = source.disk();
    if arguments.json {
        let mut document = json!({ "targets": plans });
        if let Some(disk) = disk {
            document["disk"] = disk.into();
        }
        print_json(&document);
    } else {
        print(&tables::plans(&plans).to_string());
        if let [plan] = plans.as_slice() {
            print(&tables::weights(plan).to_string());
        }
        if let Some(groups) = tables::worst_groups(&plans) {
            print(&groups.to_string());
        }
        print_notes(&plans);
        if let Some(later) = tables::later(&plans) {
            print(&later.to_string());
        }
        if let Some(disk) = disk {
            print(&format!("The run takes at most {} on disk, its live state included.", bytes(disk)));
        }
    }
    if arguments.plot.is_empty() { Ok(()) } else { draw(&arguments.plot, &source, &plans) }
}

fn draw(plot: &PlotArgs, source: &PlanSource, plans: &[Plan]) -> Outcome {
    let mut panels = Vec::new();
    for plan in plans {
        panels.push(ProfilePanel { plan, densities: source.densities(plan)? });
    }
    let tracked = source.tracked().into_iter().map(|(index, profile)| (index, profile.to_string())).collect();
    let picture = Profiles { panels, tracked, rounding: Some(source.rounding()) };
    Ok(plot.draw(|path| pictures::draw_profiles(path, &picture))?)
}
