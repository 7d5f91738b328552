//! `posthoc-ema error`.

use std::path::PathBuf;

use clap::Args;
use posthoc_ema::{At, Plan, Profile};
use serde_json::{Value, json};

use super::args::{AtArgs, NoiseArgs};
use super::forecast::ForecastArgs;
use super::list::Numbers;
use super::open::OpenArgs;
use super::output::{print, print_json, print_notes, print_warnings};
use super::plot::PlotArgs;
use super::source::{PlanSource, length_at};
use super::targets::{numbers, profiles};
use super::{Failure, Outcome};
use crate::pictures::{self, ErrorCurve, ErrorPoint};
use crate::tables;

/// Show the reconstruction error over the length of the average, of a run or before training
///
/// A picture shows it at many lengths from the shortest to the longest that are listed, with the tracked profiles
/// marked. The noise floor, what is left of the rounding of stored snapshots relative to the weights, is shaded.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    run: Option<PathBuf>,
    /// Lengths by relative standard deviation
    #[arg(long, value_name = "LIST", default_value = "0.02,0.03,...,0.28", allow_negative_numbers = true)]
    sigma_rel: Vec<Numbers>,
    #[command(flatten)]
    at: AtArgs,
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
    forecast: ForecastArgs,
}

/// Shows the reconstruction error over the length of the average.
pub fn run(arguments: &Arguments) -> Outcome {
    arguments.plot.check()?;
    let targets: Vec<Profile> = profiles(&arguments.sigma_rel, Profile::sigma_rel).collect::<Result<_, Failure>>()?;
    let source = PlanSource::open(arguments.run.as_deref(), &arguments.open, &arguments.forecast)?;
    let plans = source.plans(&targets, arguments.at.at(), arguments.noise.noise)?;
    print_warnings(&plans);
    if arguments.json {
        let errors: Vec<Value> = numbers(&arguments.sigma_rel).zip(&plans).map(error_json).collect();
        print_json(&json!({ "errors": errors }));
    } else {
        print(&tables::errors(&plans).to_string());
        if let Some(groups) = tables::worst_groups(&plans) {
            print(&groups.to_string());
        }
        print_notes(&plans);
    }
    if arguments.plot.is_empty() { Ok(()) } else { draw(arguments, &source, &plans) }
}

fn error_json((sigma_rel, plan): (f64, &Plan)) -> Value {
    json!({
        "sigma_rel": sigma_rel,
        "at": plan.at,
        "relative_error": plan.relative_error,
        "noise_gain": plan.noise_gain,
        "rho": plan.rho,
        "predicted": plan.predicted,
        "no_prediction": plan.no_prediction,
        "event": plan.event,
        "worst_group": plan.worst_group,
        "warning": plan.shortfall,
    })
}

/// Draws the curve over the listed lengths and many more between them.
fn draw(arguments: &Arguments, source: &PlanSource, listed: &[Plan]) -> Outcome {
    let at = listed.first().map_or(0, |plan| plan.at);
    let tracked: Vec<(f64, String)> = source
        .tracked()
        .values()
        .filter_map(|profile| Some((length_at(profile, at)?, tables::length_name(profile))))
        .collect();
    let marks: Vec<f64> = tracked.iter().map(|(sigma_rel, _)| *sigma_rel).collect();
    let first = numbers(&arguments.sigma_rel).fold(f64::INFINITY, f64::min);
    let last = numbers(&arguments.sigma_rel).fold(0.0, f64::max);
    let lengths = pictures::error_grid(first, last, &marks);
    let targets: Vec<Profile> = lengths.into_iter().map(Profile::sigma_rel).collect::<Result<_, _>>()?;
    let plans = source.plans(&targets, At::Step(at), arguments.noise.noise)?;
    let curve = ErrorCurve {
        title: format!("{}, at step {at}", source.title()),
        points: plans.iter().filter_map(ErrorPoint::of).collect(),
        tracked,
        rounding: Some(source.rounding()),
    };
    Ok(arguments.plot.draw(|path| pictures::draw_error_curve(path, &curve))?)
}
