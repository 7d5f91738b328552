//! Plans, errors, sweeps and measurements as tables.

use comfy_table::{CellAlignment, Table, presets};
use posthoc_ema::math::Profile;
use posthoc_ema::{Advice, Merge, Plan, PredictedError, shown};

use crate::bench::Measurement;
use crate::numbers::{number, percent, share};

/// Returns an empty table in the style of all tables: no rules, numbers to the right.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Lists the errors of each target.
pub fn plans(plans: &[Plan]) -> Table {
    let header = ["target", "at", "relative error", "noise gain", "rho", "condition", "snapshots"];
    let mut table = table(&[&header[..], predicted_header(plans)].concat());
    for plan in plans {
        let target = [plan.profile.to_string(), plan.at.to_string()];
        let figures = [plan.relative_error, plan.noise_gain, plan.rho, plan.condition].map(number);
        let row = target.into_iter().chain(figures).chain([plan.weights.len().to_string()]);
        table.add_row(row.chain(predicted(plan)));
    }
    table
}

/// Lists pieces of advice, one for each disk size and number of profiles, with predicted errors if there are any.
pub fn advice(all: &[Advice], predicted: &[Option<PredictedError>]) -> Table {
    let header = ["track", "kept", "every", "on disk", "worst error", "noise gain", "with rounding", "at sigma_rel"];
    let any = predicted.iter().any(Option::is_some);
    let mut table = table(&[&header[..], if any { &["predicted error"] } else { &[] }].concat());
    for (Advice { forecast, worst, disk }, predicted) in all.iter().zip(predicted) {
        let figures = [
            lengths(&forecast.tracked),
            forecast.keep.to_string(),
            forecast.schedule.checkpoint_every.to_string(),
            gigabytes(*disk),
            number(worst.relative_error),
            number(worst.noise_gain),
            number(worst.error),
            number(worst.sigma_rel),
        ];
        table.add_row(figures.into_iter().chain(predicted.map(|error| number(error.total))));
    }
    table
}

/// Joins the length names of profiles: `0.05, 0.28`.
pub fn lengths(profiles: &[Profile]) -> String {
    profiles.iter().map(length_name).collect::<Vec<_>>().join(", ")
}

/// Returns the `sigma_rel` alone of a power function, and the usual name of any other profile.
pub fn length_name(profile: &Profile) -> String {
    let text = profile.to_string();
    text.strip_prefix("sigma_rel ").map_or_else(|| text.clone(), str::to_owned)
}

fn gigabytes(bytes: u64) -> String {
    format!("{} GB", number(bytes as f64 / 1e9))
}

/// Returns the headers of the columns of [`predicted`]: none unless one of the plans has a prediction.
pub fn predicted_header(plans: &[Plan]) -> &'static [&'static str] {
    let any = plans.iter().any(|plan| plan.predicted.is_some());
    if any { &["predicted error", "by profile", "by rounding"] } else { &[] }
}

/// Returns the predicted error of a plan, relative to the weights, and its parts. Empty without a prediction.
pub fn predicted(plan: &Plan) -> Vec<String> {
    plan.predicted.map_or(Vec::new(), |error| [error.total, error.profile, error.rounding].map(number).to_vec())
}

/// Lists the group of tensors of the largest predicted error for each target; `None` if all tensors move alike.
pub fn worst_groups(plans: &[Plan]) -> Option<Table> {
    let mut table = table(&["worst group of", "at", "of the elements", "predicted error", "tensors"]);
    for plan in plans {
        let Some(group) = &plan.worst_group else { continue };
        table.add_row([
            plan.profile.to_string(),
            plan.at.to_string(),
            percent(group.share),
            number(group.predicted.total),
            names(&group.tensors),
        ]);
    }
    (!table.is_empty()).then_some(table)
}

/// Says which tensors keep `--noise auto` from a better regularisation, with the remedy.
pub fn held_back(plan: &Plan) -> Option<String> {
    let held = plan.held_back.as_ref()?;
    Some(format!(
        "{}: --noise {:.3e} would lower the predicted error to {}, but make these tensors worse: {}. --noise auto \
         leaves it out for their sake: give it yourself if they matter little",
        plan.profile,
        held.rho,
        number(held.predicted.total),
        names(&held.tensors)
    ))
}

/// Returns the names of a few tensors, or the first and the last of many.
fn names(tensors: &[String]) -> String {
    match tensors {
        [first, _, .., last] => format!("{} of them: {} ... {}", tensors.len(), shown(first), shown(last)),
        few => few.iter().map(shown).collect::<Vec<_>>().join(", "),
    }
}

/// Lists the weight of each snapshot in one target.
pub fn weights(plan: &Plan) -> Table {
    let mut table = table(&["snapshot", "weight"]);
    for weight in &plan.weights {
        table.add_row([format!("{}.{}", weight.index, weight.step), format!("{:+.6e}", weight.weight)]);
    }
    table
}

/// Lists the tensors that are averaged since a later step than the others, with their errors; `None` if there are none.
pub fn later(plans: &[Plan]) -> Option<Table> {
    let mut table = table(&["averaged since", "target", "at", "relative error", "noise gain", "tensors"]);
    for plan in plans {
        for later in &plan.later {
            table.add_row([
                format!("step {}", later.since),
                plan.profile.to_string(),
                plan.at.to_string(),
                number(later.relative_error),
                number(later.noise_gain),
                names(&later.tensors),
            ]);
        }
    }
    (!table.is_empty()).then_some(table)
}

/// Lists the errors of averages of checkpoints.
pub fn merges(merges: &[Merge]) -> Table {
    let mut table = table(&["target", "at", "relative error", "late by steps", "checkpoints", "that count"]);
    for merge in merges {
        table.add_row([
            merge.profile.to_string(),
            merge.at.to_string(),
            number(merge.relative_error),
            number(merge.lag_steps),
            merge.weights.len().to_string(),
            number(merge.effective_checkpoints),
        ]);
    }
    table
}

/// Lists the weight of each checkpoint in one average.
pub fn checkpoint_weights(merge: &Merge) -> Table {
    let mut table = table(&["checkpoint", "step", "weight"]);
    for weight in &merge.weights {
        table.add_row([shown(&weight.path), weight.step.to_string(), share(weight.weight)]);
    }
    table
}

/// Lists the reconstruction error of each target.
pub fn errors(plans: &[Plan]) -> Table {
    let mut table = table(&[&["target", "relative error", "noise gain"], predicted_header(plans)].concat());
    for plan in plans {
        let figures = [plan.relative_error, plan.noise_gain].map(number);
        table.add_row(std::iter::once(plan.profile.to_string()).chain(figures).chain(predicted(plan)));
    }
    table
}

/// Lists the rate of each piece of work, in 10^9 bytes a second, and its share of the limit.
pub fn measurements(rows: &[Measurement]) -> Table {
    let mut table = table(&["device", "work", "what", "ms", "GB/s", "of the limit", "which is"]);
    for column in table.column_iter_mut().filter(|column| matches!(column.index, 1 | 2 | 6)) {
        column.set_cell_alignment(CellAlignment::Left);
    }
    for row in rows {
        table.add_row([
            row.device.clone(),
            row.work.to_string(),
            row.name.clone(),
            number(1e3 * row.seconds_median),
            number(row.bytes_per_second / 1e9),
            row.share_of_limit.map(percent).unwrap_or_default(),
            row.limit.clone().unwrap_or_default(),
        ]);
    }
    table
}
