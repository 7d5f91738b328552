//! Tables that the example prints.

use comfy_table::{Cell, CellAlignment, Table, presets};

use crate::agreement::Agreement;
use crate::evaluate::Losses;

/// Formats the loss of each average, with the best one marked, and that of the last weights.
pub fn losses(losses: &Losses) -> String {
    let mut table = table(["sigma_rel", "held-out loss", "change", "profile error", "noise gain", ""]);
    let best = losses.best().map(|(best, _)| best.sigma_rel);
    for (average, loss) in &losses.averages {
        let mark = if Some(average.sigma_rel) == best { "<- best" } else { "" };
        table.add_row(row([
            format!("{:.4}", average.sigma_rel),
            format!("{:.4}", loss),
            format!("{:+.1}%", 100.0 * (loss / losses.last - 1.0)),
            percent(average.predicted_error),
            format!("{:.2}", average.noise_gain),
            mark.into(),
        ]));
    }
    let last = ["last weights".into(), format!("{:.4}", losses.last)];
    table.add_row(row(last));
    table.trim_fmt()
}

/// Formats the differences between synthesized and tracked averages, with their bounds.
pub fn agreements(agreements: &[Agreement]) -> String {
    let mut table = table(["sigma_rel", "to last weights", "to tracked", "ratio", "allowed", "profile error"]);
    for a in agreements {
        table.add_row(row([
            format!("{:.2}", a.sigma_rel),
            format!("{:.2e}", a.distance),
            format!("{:.2e}", a.difference),
            percent(a.difference / a.distance),
            percent(a.allowed / a.distance),
            percent(a.predicted_error),
        ]));
    }
    table.trim_fmt()
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(row(header));
    table
}

fn row<const N: usize, T: ToString>(cells: [T; N]) -> Vec<Cell> {
    cells.map(|cell| Cell::new(cell).set_alignment(CellAlignment::Right)).into()
}

fn percent(share: f64) -> String {
    format!("{:.2}%", 100.0 * share)
}
