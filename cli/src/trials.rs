//! Trials of a sweep as tables and sentences.

use comfy_table::{CellAlignment, Table};
use posthoc_ema::SweepResult;
use posthoc_ema::math::{Family, Profile};
use posthoc_ema::sweep::{Comparison, Sweep, Trial};

use crate::numbers::{exact, number};
use crate::tables::{length_name, table};

/// Lists every trial of a sweep, by family and length, with the best ones marked.
pub fn trials(sweep: &Sweep) -> Table {
    rows(sweep, by_length(sweep))
}

/// Lists the trials that no other one beats in all metrics.
pub fn unbeaten(sweep: &Sweep) -> Table {
    let unbeaten = sweep.unbeaten();
    rows(sweep, by_length(sweep).into_iter().filter(|trial| unbeaten.contains(trial)).collect())
}

fn rows(sweep: &Sweep, trials: Vec<&Trial>) -> Table {
    let names: Vec<&str> = sweep.metrics().iter().map(|metric| metric.name.as_str()).collect();
    let header = [&["target"], &names[..], &["relative error", "noise gain", ""]].concat();
    let mut table = table(&header);
    table.column_mut(header.len() - 1).into_iter().for_each(|column| {
        column.set_cell_alignment(CellAlignment::Left);
    });
    let marks = Marks::new(sweep);
    for trial in trials {
        let figure = |value: Option<f64>| value.map(number).unwrap_or_default();
        let mut row = vec![trial.profile.to_string()];
        row.extend((0..names.len()).map(|metric| trial.mean(metric).map_or("failed".into(), exact)));
        row.extend([figure(trial.metrics.relative_error), figure(trial.metrics.noise_gain), marks.of(trial)]);
        table.add_row(row);
    }
    table
}

/// Lists trials of a joint sweep in the order of their evaluation: the target of the tensors without a group, that of
/// each group, and the metrics.
pub fn joint(swept: &SweepResult, trials: &[Trial]) -> Table {
    let names: Vec<&str> = trials.first().iter().flat_map(|trial| trial.groups.keys()).map(String::as_str).collect();
    let metrics: Vec<&str> = swept.sweep.metrics().iter().map(|metric| metric.name.as_str()).collect();
    let header = [&[part_name(None)], &names[..], &metrics[..], &["relative error", ""]].concat();
    let mut table = table(&header);
    table.column_mut(header.len() - 1).into_iter().for_each(|column| {
        column.set_cell_alignment(CellAlignment::Left);
    });
    for trial in trials {
        let mut row = vec![trial.profile.to_string()];
        row.extend(trial.groups.values().map(Profile::to_string));
        row.extend((0..metrics.len()).map(|metric| trial.mean(metric).map_or("failed".into(), exact)));
        row.push(trial.metrics.relative_error.map(number).unwrap_or_default());
        let best = swept.best_trials.iter().zip(&metrics).filter(|(best, _)| *best == trial);
        row.push(best_mark(&best.map(|(_, name)| *name).collect::<Vec<_>>(), metrics.len()));
        table.add_row(row);
    }
    table
}

/// Names the targets of a trial: `sigma_rel 0.1, sigma_rel 0.2 for decoder.*`.
pub fn targets(trial: &Trial) -> String {
    let groups = trial.groups.iter().map(|(group, profile)| format!("{profile} for {group}"));
    std::iter::once(trial.profile.to_string()).chain(groups).collect::<Vec<_>>().join(", ")
}

/// Names a part of a joint sweep: a group, or the tensors without one.
pub fn part_name(part: Option<&str>) -> &str {
    part.unwrap_or("other tensors")
}

/// Marks a trial with the names of the metrics by which it is the best. `metrics` is the number of all.
fn best_mark(names: &[&str], metrics: usize) -> String {
    match names {
        [] => String::new(),
        [_] if metrics == 1 => "best".into(),
        _ => format!("best {}", names.join(", ")),
    }
}

/// Sorts the families by their first evaluation, and the trials of each by length.
fn by_length(sweep: &Sweep) -> Vec<&Trial> {
    let mut trials: Vec<(usize, f64, &Trial)> = Vec::new();
    for trial in sweep.trials() {
        let family = family(trial);
        let first = sweep.trials().iter().position(|other| self::family(other) == family).unwrap_or_default();
        let length = trial.profile.family().map_or(0.0, |(_, length)| length);
        trials.push((first, length, trial));
    }
    trials.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    trials.into_iter().map(|(_, _, trial)| trial).collect()
}

fn family(trial: &Trial) -> Option<Family> {
    trial.profile.family().map(|(family, _)| family)
}

/// Marks at the end of the rows.
struct Marks<'a> {
    sweep: &'a Sweep,
    best: Vec<Option<&'a Trial>>,
    comparison: Option<Comparison>,
}

impl<'a> Marks<'a> {
    fn new(sweep: &'a Sweep) -> Marks<'a> {
        let metrics = sweep.metrics().len();
        // Each metric has lengths of its own that are as good. A sentence names them.
        let comparison = if metrics == 1 { sweep.comparison(0) } else { None };
        Marks { sweep, best: (0..metrics).map(|metric| sweep.best_by(metric)).collect(), comparison }
    }

    fn of(&self, trial: &Trial) -> String {
        let is_best = |best: &Option<&Trial>| best.is_some_and(|best| best.profile == trial.profile);
        let best: Vec<&str> = self
            .best
            .iter()
            .zip(self.sweep.metrics())
            .filter(|(best, _)| is_best(best))
            .map(|(_, metric)| metric.name.as_str())
            .collect();
        if !best.is_empty() {
            return best_mark(&best, self.best.len());
        }
        if self.comparison.as_ref().is_some_and(|comparison| comparison.as_good.contains(&trial.profile)) {
            return "as good".into();
        }
        if trial.refined { "refined".into() } else { String::new() }
    }
}

/// Names the lengths that are as good as the best one by a metric: `0.08 to 0.13 are as good`. Returns `None` if the
/// evaluations were not repeated.
pub fn as_good(sweep: &Sweep, metric: usize) -> Option<String> {
    let comparison = sweep.comparison(metric)?;
    let error = number(comparison.standard_error);
    let ranges = ranges(sweep, metric, &comparison);
    Some(if comparison.as_good.len() == 1 {
        format!("no other length is as good (standard error {error})")
    } else {
        format!("{ranges} are as good (standard error {error})")
    })
}

/// Joins the lengths that are as good: neighbours as ranges.
fn ranges(sweep: &Sweep, metric: usize, comparison: &Comparison) -> String {
    let mut runs: Vec<(&Trial, &Trial)> = Vec::new();
    let mut follows = false;
    for trial in by_length(sweep).into_iter().filter(|trial| trial.mean(metric).is_some()) {
        let is_as_good = comparison.as_good.contains(&trial.profile);
        match runs.last_mut() {
            Some((_, last)) if is_as_good && follows && family(last) == family(trial) => *last = trial,
            _ if is_as_good => runs.push((trial, trial)),
            _ => {}
        }
        follows = is_as_good;
    }
    let name = |(first, last): &(&Trial, &Trial)| match first.profile == last.profile {
        true => length_name(&first.profile),
        false => format!("{} to {}", length_name(&first.profile), length_name(&last.profile)),
    };
    runs.iter().map(name).collect::<Vec<_>>().join(", ")
}
