//! Plans, errors and measurements as tables.

use comfy_table::{CellAlignment, Table, presets};

use super::axis;
use crate::bench::Measurement;
use posthoc_ema::Merge;
use posthoc_ema::math::Profile;
use posthoc_ema::{Advice, Plan};

/// An empty table in the style of all tables here: no rules, numbers to the right.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A number to four significant digits, in the shorter notation.
pub fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    if !(1e-3..1e6).contains(&value.abs()) {
        return format!("{value:.3e}");
    }
    // The exponent after rounding to four digits: 0.99999 is 1.000 and not 1.0000.
    let exponent: i32 = format!("{value:.3e}").rsplit('e').next().and_then(|e| e.parse().ok()).unwrap_or(0);
    let digits = (3 - exponent).max(0) as usize;
    format!("{value:.digits$}")
}

/// A number to the fifteen digits that an f64 holds for sure: 0.1, where the last bits would make it 0.10000000000000002.
pub fn exact(value: f64) -> String {
    let rounded: f64 = format!("{value:.14e}").parse().unwrap_or(value);
    rounded.to_string()
}

/// What each target will be like.
pub fn plans(plans: &[Plan]) -> Table {
    let header = ["target", "at", "relative error", "noise gain", "rho", "condition", "snapshots"];
    let mut table = table(&[&header[..], predicted_header(plans)].concat());
    for plan in plans {
        let about = [plan.profile.to_string(), plan.at.to_string()];
        let figures = [plan.relative_error, plan.noise_gain, plan.rho, plan.condition].map(number);
        let row = about.into_iter().chain(figures).chain([plan.weights.len().to_string()]);
        table.add_row(row.chain(predicted(plan)));
    }
    table
}

/// What a disk is best spent on.
pub fn advice(all: &[Advice]) -> Table {
    let header = ["track", "kept", "every", "on disk", "worst error", "noise gain", "with rounding", "at sigma_rel"];
    let mut table = table(&header);
    for Advice { forecast, worst, disk } in all {
        table.add_row([
            lengths(&forecast.tracked),
            forecast.keep.to_string(),
            forecast.schedule.checkpoint_every.to_string(),
            gigabytes(*disk),
            number(worst.relative_error),
            number(worst.noise_gain),
            number(worst.error),
            number(worst.sigma_rel),
        ]);
    }
    table
}

/// Profiles, power functions by their length alone: `0.05, 0.28`.
pub fn lengths(profiles: &[Profile]) -> String {
    profiles.iter().map(length_name).collect::<Vec<_>>().join(", ")
}

/// The short name of a profile where lengths are spoken of: the length alone, where it is one.
pub fn length_name(profile: &Profile) -> String {
    let text = profile.to_string();
    text.strip_prefix("sigma_rel ").map_or_else(|| text.clone(), str::to_owned)
}

fn gigabytes(bytes: u64) -> String {
    format!("{} GB", number(bytes as f64 / 1e9))
}

/// The columns of [`predicted`], where any of the plans has a prediction: the error of the average that is to be expected,
/// relative to the weights, and its parts.
pub fn predicted_header(plans: &[Plan]) -> &'static [&'static str] {
    let any = plans.iter().any(|plan| plan.predicted.is_some());
    if any { &["predicted error", "by profile", "by rounding"] } else { &[] }
}

/// The predicted error of a plan and its parts; nothing where there is no prediction.
pub fn predicted(plan: &Plan) -> Vec<String> {
    plan.predicted.map_or(Vec::new(), |error| [error.total, error.profile, error.rounding].map(number).to_vec())
}

/// The weight of each snapshot in one target.
pub fn weights(plan: &Plan) -> Table {
    let mut table = table(&["snapshot", "weight"]);
    for weight in &plan.weights {
        table.add_row([format!("{}.{}", weight.index, weight.step), format!("{:+.6e}", weight.weight)]);
    }
    table
}

/// What averages of checkpoints will be like.
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

/// The weight of each checkpoint in one average.
pub fn checkpoint_weights(merge: &Merge) -> Table {
    let mut table = table(&["checkpoint", "step", "weight"]);
    for weight in &merge.weights {
        table.add_row([weight.path.display().to_string(), weight.step.to_string(), format!("{:.6e}", weight.weight)]);
    }
    table
}

/// The reconstruction error over the targets.
pub fn errors(plans: &[Plan]) -> Table {
    let mut table = table(&[&["target", "relative error", "noise gain"], predicted_header(plans)].concat());
    for plan in plans {
        let figures = [plan.relative_error, plan.noise_gain].map(number);
        table.add_row(std::iter::once(plan.profile.to_string()).chain(figures).chain(predicted(plan)));
    }
    table
}

/// How fast each piece of work is, and by how much it misses its limit. Gigabytes are 10^9 bytes.
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

/// A share in whole percent.
pub(super) fn percent(share: f64) -> String {
    format!("{:.0}%", 100.0 * share)
}

/// A share in percent to two digits or so; the smallest as powers of ten.
pub(super) fn short_percent(share: f64) -> String {
    let percent = 100.0 * share;
    match percent {
        10.0.. => format!("{percent:.0}%"),
        1.0.. => format!("{percent:.1}%"),
        0.01.. => format!("{percent:.2}%"),
        _ => axis::label(format!("{share:.1e}").parse().unwrap_or(share)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1.000"),
            (0.999_999, "1.000"),
            (999_999.9, "1000000"),
            (0.034115096, "0.03412"),
            (13.366189, "13.37"),
            (-222.2639, "-222.3"),
            (390_000.0, "390000"),
            (1.2286e-13, "1.229e-13"),
            (3.5e8, "3.500e8"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn shares_are_short() {
        for (share, text) in [(0.26, "26%"), (0.0612, "6.1%"), (0.00617, "0.62%"), (1.23e-5, "1.2×10⁻⁵"), (0.0, "0")]
        {
            assert_eq!(short_percent(share), text);
        }
    }
}
