//! `posthoc-ema plan`.

use posthoc_ema::report;

use super::args::Plan;
use super::output::{print, print_json};
use super::{Outcome, targets};

/// Solves targets and shows what they will be like; a single one with its weights.
pub fn run(arguments: &Plan) -> Outcome {
    let profiles = arguments.targets.profiles()?;
    let plans = targets::plans(arguments.run.as_deref(), &arguments.before, &profiles, arguments.at)?;
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
