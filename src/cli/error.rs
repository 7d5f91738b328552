//! `posthoc-ema error`.

use posthoc_ema::{Plan, Profile, report};

use super::args::ErrorOver;
use super::output::{print, print_json};
use super::{Failure, Outcome, targets};

/// Shows the reconstruction error over the length of the average.
pub fn run(arguments: &ErrorOver) -> Outcome {
    let profiles: Vec<Profile> =
        targets::profiles(&arguments.sigma_rel, Profile::sigma_rel).collect::<Result<_, Failure>>()?;
    let plans = targets::plans(arguments.run.as_deref(), &arguments.before, &profiles, arguments.at)?;
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
    })
}
