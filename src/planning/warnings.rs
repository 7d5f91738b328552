//! Warnings of plans with a large error.

use std::collections::BTreeSet;
use std::mem::{Discriminant, discriminant};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::plan::Plan;
use super::shortfall::Shortfall;

/// Target of the `tracing` warnings of averages that are far from what was asked for.
pub const ACCURACY_LOG: &str = "posthoc_ema::accuracy";

/// Most warnings that are remembered, so that a process that asks for ever new targets does not grow.
const MOST_REMEMBERED: usize = 4096;

/// Run, target and reason of each warning of this process.
static LOGGED: Mutex<BTreeSet<(PathBuf, String)>> = Mutex::new(BTreeSet::new());

/// Returns one warning for each kind of [`Shortfall`] among plans, with the reason and the remedy.
///
/// It names the plan of the largest error, and counts the others.
pub fn warnings<'a>(plans: impl IntoIterator<Item = &'a Plan>) -> Vec<String> {
    let mut groups: Vec<(Discriminant<Shortfall>, Vec<&Plan>)> = Vec::new();
    for plan in plans {
        let Some(kind) = plan.shortfall.as_ref().map(discriminant) else { continue };
        match groups.iter_mut().find(|(other, _)| *other == kind) {
            Some((_, group)) => group.push(plan),
            None => groups.push((kind, vec![plan])),
        }
    }
    groups.iter().filter_map(|(_, group)| warning(group)).collect()
}

/// Returns the warning of plans with one kind of shortfall.
fn warning(group: &[&Plan]) -> Option<String> {
    let worst = group.iter().max_by(|a, b| large_error(a).total_cmp(&large_error(b)))?;
    let others = match group.len() - 1 {
        0 => String::new(),
        1 => ", and 1 more target of more than 5%".into(),
        others => format!(", and {others} more targets of more than 5%"),
    };
    let Plan { profile, at, shortfall, .. } = worst;
    let percent = 100.0 * large_error(worst);
    let percent = if percent < 10.0 { format!("{percent:.1}%") } else { format!("{percent:.0}%") };
    Some(format!("{profile} at step {at} has a relative error of {percent}{others}: {}", shortfall.as_ref()?))
}

/// Returns the relative error that a plan's shortfall is the reason for.
fn large_error(plan: &Plan) -> f64 {
    match plan.shortfall {
        Some(Shortfall::Later { relative_error, .. }) => relative_error,
        _ => plan.relative_error,
    }
}

/// Logs the warnings of plans of the run in `dir`, to [`ACCURACY_LOG`].
///
/// Each target of a run is logged once in a process, however often it is evaluated. Syntheses call it; plans alone do
/// not.
pub fn log_warnings<'a>(dir: &Path, plans: impl IntoIterator<Item = &'a Plan>) {
    let new: Vec<&Plan> = plans.into_iter().filter(|plan| is_new(dir, plan)).collect();
    for text in warnings(new) {
        tracing::warn!(target: ACCURACY_LOG, "{text}");
    }
}

/// Returns true, and remembers it, if a plan has a shortfall that was not logged yet.
fn is_new(dir: &Path, plan: &Plan) -> bool {
    let reason = match &plan.shortfall {
        None => return false,
        Some(Shortfall::Between { .. }) => format!("between, at {}", plan.at),
        Some(Shortfall::Outside { .. }) => "outside".into(),
        Some(Shortfall::Few { .. }) => "few".into(),
        Some(Shortfall::Later { since, .. }) => format!("later, since {since}"),
    };
    let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    if logged.len() >= MOST_REMEMBERED {
        logged.clear();
    }
    logged.insert((dir.to_owned(), format!("{}: {reason}", plan.profile)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::Retention;
    use crate::math::{Profile, Schedule};
    use crate::planning::{At, Forecast};

    fn forecast(growth: Option<f64>, steps: u64, tracked: &[f64]) -> Forecast {
        let schedule = Schedule { snapshot_growth: growth, ..Schedule::default() };
        let tracked = tracked.iter().map(|length| Profile::sigma_rel(*length).unwrap()).collect();
        Forecast { schedule, steps, keep: 99, retention: Retention::default(), tracked }
    }

    fn plans(forecast: &Forecast, lengths: &[f64], at: At) -> Vec<Plan> {
        let profiles: Vec<Profile> = lengths.iter().map(|length| Profile::sigma_rel(*length).unwrap()).collect();
        forecast.plans(&profiles, at).unwrap()
    }

    #[test]
    fn plan_of_a_small_error_has_no_warning() {
        let plans = plans(&forecast(Some(1.2), 1000, &[0.05, 0.28]), &[0.05, 0.1, 0.15, 0.28], At::Latest);
        assert!(plans.iter().all(|plan| plan.relative_error < 0.05 && plan.shortfall.is_none()));
        assert!(warnings(&plans).is_empty());
        assert_eq!(serde_json::json!(plans[0])["warning"], serde_json::Value::Null);
    }

    #[test]
    fn too_few_snapshots_are_named_with_the_remedy() {
        let few = plans(&forecast(None, 1000, &[0.05, 0.28]), &[0.1, 0.15, 0.2], At::Latest);
        assert_eq!(few[1].shortfall, Some(Shortfall::Few { steps: 1, first: 1000, last: 1000 }));
        let [text] = &warnings(&few)[..] else { panic!("{few:?}") };
        let worst = few.iter().map(|plan| plan.relative_error).fold(0.0, f64::max);
        let start = format!("at step 1000 has a relative error of {:.0}%, and 2 more targets", 100.0 * worst);
        for part in [&start, "averages of step 1000 alone are too few so far", "snapshot_growth", "checkpoint_every"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(serde_json::json!(few[0])["warning"].as_str().unwrap().contains("too few"));
    }

    #[test]
    fn time_between_snapshots_names_the_nearest() {
        let even = forecast(None, 5000, &[0.05, 0.28]);
        for (at, nearest) in [(4990, 5000), (4100, 4000), (4500, 4000)] {
            let plan = plans(&even, &[0.15], At::Step(at)).remove(0);
            assert!(plan.relative_error > 0.05);
            assert_eq!(plan.shortfall, Some(Shortfall::Between { nearest }));
            let text = warnings([&plan]).remove(0);
            assert!(text.contains(&format!("ask for step {nearest}, the nearest")), "{text}");
        }
    }

    #[test]
    fn length_outside_of_the_tracked_ones_names_them() {
        let range = forecast(Some(1.2), 10_000, &[0.1, 0.2]);
        let plan = plans(&range, &[0.02], At::Latest).remove(0);
        assert_eq!(warnings([&plan]).len(), 1);
        assert!(warnings([&plan])[0].contains("outside of the tracked sigma_rel 0.1 to 0.2: ask for one within"));
        let one = plans(&forecast(Some(1.2), 10_000, &[0.2]), &[0.02], At::Latest).remove(0);
        assert!(warnings([&one])[0].contains("outside of the only tracked sigma_rel, 0.2"));
        // The tracked lengths themselves are exact.
        assert!(plans(&range, &[0.1, 0.2], At::Latest).iter().all(|plan| plan.shortfall.is_none()));
    }

    #[test]
    fn each_reason_has_one_warning() {
        let mut all = plans(&forecast(None, 2000, &[0.1, 0.2]), &[0.02, 0.03, 0.15], At::Latest);
        all.extend(plans(&forecast(None, 2000, &[0.1, 0.2]), &[0.15], At::Step(1500)));
        let found = warnings(&all);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].starts_with("sigma_rel 0.02 at step 2000") && found[0].contains("and 1 more target"));
    }

    #[test]
    fn target_of_a_run_is_new_once() {
        let plan = plans(&forecast(None, 1000, &[0.05, 0.28]), &[0.15], At::Latest).remove(0);
        let later = plans(&forecast(None, 2000, &[0.05, 0.28]), &[0.15], At::Latest).remove(0);
        let (one, other) = (Path::new("one of these runs"), Path::new("another of these runs"));
        assert!(is_new(one, &plan) && !is_new(one, &plan) && !is_new(one, &later));
        assert!(is_new(other, &plan));
        let between = plans(&forecast(None, 2000, &[0.05, 0.28]), &[0.15], At::Step(1500)).remove(0);
        assert!(is_new(one, &between) && !is_new(one, &between));
        assert!(!is_new(one, &Plan { shortfall: None, ..plan }));
    }
}
