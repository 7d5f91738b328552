//! `posthoc-ema error`.

use std::path::PathBuf;

use crate::report::{self, ErrorCurve, ErrorPoint};
use clap::Args;
use posthoc_ema::{Plan, Profile};

use super::args::{Before, Rounding};
use super::list::Numbers;
use super::output::{print, print_json};
use super::picture::Plot;
use super::reading::Reading;
use super::subject::{Subject, length_at};
use super::{Failure, Outcome, targets};

/// Show the reconstruction error over the length of the average, of a run or before training
///
/// A picture shows it at many lengths from the shortest to the longest that are listed, with the tracked profiles marked. The
/// noise floor, what is left of the rounding of stored snapshots relative to the weights, is shaded.
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
    pub before: Before,
}

/// Shows the reconstruction error over the length of the average.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles: Vec<Profile> =
        targets::profiles(&arguments.sigma_rel, Profile::sigma_rel).collect::<Result<_, Failure>>()?;
    let subject = Subject::open(arguments.run.as_deref(), &arguments.reading, &arguments.before)?;
    let plans = subject.plans(&profiles, arguments.at, arguments.rounding.noise)?;
    if arguments.json {
        let errors = targets::numbers(&arguments.sigma_rel).zip(&plans).map(point);
        print_json(&serde_json::json!({ "errors": errors.collect::<Vec<_>>() }));
    } else {
        print(&report::errors(&plans).to_string());
    }
    if arguments.plot.is_empty() { Ok(()) } else { draw(arguments, &subject, &plans) }
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

/// Draws the curve over the lengths that are listed, and many more between them.
fn draw(arguments: &Arguments, subject: &Subject, listed: &[Plan]) -> Outcome {
    let at = listed.first().map_or(0, |plan| plan.at);
    let tracked: Vec<(f64, String)> = subject
        .tracked()
        .values()
        .filter_map(|profile| Some((length_at(profile, at)?, report::length_name(profile))))
        .collect();
    let lengths = || targets::numbers(&arguments.sigma_rel);
    let (first, last) = (lengths().fold(f64::INFINITY, f64::min), lengths().fold(0.0, f64::max));
    let marks: Vec<f64> = tracked.iter().map(|(sigma_rel, _)| *sigma_rel).collect();
    let grid = report::error_grid(first, last, &marks);
    let grid: Vec<Profile> = grid.into_iter().map(Profile::sigma_rel).collect::<Result<_, _>>()?;
    let plans = subject.plans(&grid, Some(at), arguments.rounding.noise)?;
    let curve = ErrorCurve {
        title: format!("{}, at step {at}", subject.title()),
        points: plans.iter().filter_map(ErrorPoint::of).collect(),
        tracked,
        rounding: Some(subject.rounding()),
    };
    Ok(arguments.plot.draw(|path| report::error_curve(path, &curve))?)
}
