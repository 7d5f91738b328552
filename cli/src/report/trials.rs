//! The trials of a sweep as a table.

use comfy_table::{CellAlignment, Table};

use super::table::{exact, number, table};
use posthoc_ema::sweep::{Sweep, Trial};

/// Every trial of a sweep, by family and length, with the best one marked.
pub fn trials(sweep: &Sweep) -> Table {
    let mut table = table(&["target", "score", "relative error", "noise gain", ""]);
    table.column_mut(4).into_iter().for_each(|column| {
        column.set_cell_alignment(CellAlignment::Left);
    });
    for trial in by_length(sweep) {
        let figure = |value: Option<f64>| value.map(number).unwrap_or_default();
        table.add_row([
            trial.profile.to_string(),
            trial.score().map_or("failed".into(), exact),
            figure(trial.metrics.relative_error),
            figure(trial.metrics.noise_gain),
            mark(trial, sweep).into(),
        ]);
    }
    table
}

/// The families in the order in which they were evaluated first, each by length.
fn by_length(sweep: &Sweep) -> Vec<&Trial> {
    let family = |trial: &Trial| trial.profile.family().map(|(family, _)| family);
    let length = |trial: &Trial| trial.profile.family().map_or(0.0, |(_, length)| length);
    let first = |trial: &Trial| sweep.trials().iter().position(|other| family(other) == family(trial));
    let mut trials: Vec<&Trial> = sweep.trials().iter().collect();
    trials.sort_by(|a, b| first(a).cmp(&first(b)).then(length(a).total_cmp(&length(b))));
    trials
}

fn mark(trial: &Trial, sweep: &Sweep) -> &'static str {
    match (sweep.best().is_some_and(|best| best.profile == trial.profile), trial.refined) {
        (true, _) => "best",
        (false, true) => "refined",
        (false, false) => "",
    }
}
