//! Plans and errors as tables.

use comfy_table::{CellAlignment, Table, presets};

use crate::synthesis::Plan;

/// An empty table in the style of all tables here: numbers to the right, rules only where they help.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
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
    let digits = (3 - value.abs().log10().floor() as i32).max(0) as usize;
    format!("{value:.digits$}")
}

/// What each target will be like.
pub fn plans(plans: &[Plan]) -> Table {
    let mut table = table(&["target", "at", "relative error", "noise gain", "condition", "snapshots"]);
    for plan in plans {
        table.add_row([
            plan.profile.to_string(),
            plan.at.to_string(),
            number(plan.relative_error),
            number(plan.noise_gain),
            number(plan.condition),
            plan.weights.len().to_string(),
        ]);
    }
    table
}

/// The weight of each snapshot in one target.
pub fn weights(plan: &Plan) -> Table {
    let mut table = table(&["snapshot", "weight"]);
    for weight in &plan.weights {
        table.add_row([format!("{}.{}", weight.index, weight.step), format!("{:+.6e}", weight.weight)]);
    }
    table
}

/// The reconstruction error over the targets.
pub fn errors(plans: &[Plan]) -> Table {
    let mut table = table(&["target", "relative error", "noise gain"]);
    for plan in plans {
        table.add_row([plan.profile.to_string(), number(plan.relative_error), number(plan.noise_gain)]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1.000"),
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
}
