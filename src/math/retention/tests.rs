use super::super::{Chain, ChainSource, History, Schedule, System};
use super::*;

fn power(sigma_rel: f64) -> Profile {
    Profile::sigma_rel(sigma_rel).unwrap()
}

fn tracked() -> [Profile; 2] {
    [power(0.05), power(0.28)]
}

fn sources(tracked: &[Profile], steps: &[u64]) -> Vec<ChainSource> {
    let source = |step: u64, profile: &Profile| ChainSource {
        chain: Chain::Tracked(profile.clone()),
        step,
        label: format!("{profile} at {step}"),
    };
    steps.iter().flat_map(|&step| tracked.iter().map(move |profile| source(step, profile))).collect()
}

/// Returns the worst relative error over sigma_rel 0.05, 0.06, ..., 0.28.
fn worst(system: &System) -> f64 {
    let error = |i: u32| system.solve(&power(0.01 * f64::from(i))).unwrap().relative_error;
    (5..=28).map(error).fold(0.0, f64::max)
}

fn worst_over_updates(history: &History, tracked: &[Profile], steps: &[u64]) -> f64 {
    worst(&System::new(history, steps[steps.len() - 1], &sources(tracked, steps), 0.0).unwrap())
}

/// Returns the worst relative error over dense updates, in closed form.
fn worst_dense(tracked: &[Profile], steps: &[u64]) -> f64 {
    worst(&System::closed_form(steps[steps.len() - 1], &sources(tracked, steps), 0.0).unwrap())
}

/// Runs retention over a training, and calls `look` with the kept steps after each snapshot.
fn train(retention: &Retention, tracked: &[Profile], every: u64, last: u64, keep: usize, mut look: impl FnMut(&[u64])) {
    let mut kept: Vec<u64> = Vec::new();
    for step in (1..=last / every).map(|i| i * every) {
        kept.push(step);
        let surplus = retention.surplus(tracked, 10, &kept, keep);
        kept.retain(|step| !surplus.contains(step));
        assert_eq!((kept.len(), kept.last()), (keep.min((step / every) as usize), Some(&step)));
        look(&kept);
    }
}

/// Keeps 20 snapshots with errors below 0.95% at every step; the newest 20 reach 41%.
///
/// At step 25,000, all 25 snapshots have an error of 0.82% at sigma_rel 0.26. The best 20 snapshots at any steps would
/// have 0.66%.
#[test]
fn twenty_snapshots_of_a_million_steps_cover_the_range() {
    let history = Schedule::default().updates(1_000_000).unwrap();
    let all: Vec<u64> = (1..=25).map(|i| 1000 * i).collect();
    let bound = worst_over_updates(&history, &tracked(), &all);
    assert!((bound - 0.0082).abs() < 5e-5, "{bound}");
    let mut most = 0.0;
    let mut most_exact = 0.0;
    let mut sum = 0.0;
    train(&Retention::default(), &tracked(), 1000, 1_000_000, 20, |kept| {
        let step = kept[kept.len() - 1];
        if step >= 25_000 {
            let here = worst_dense(&tracked(), kept);
            most = f64::max(most, here);
            sum += here;
        }
        if (25_000..50_000).contains(&step) || step % 50_000 == 0 && step >= 25_000 {
            most_exact = f64::max(most_exact, worst_over_updates(&history, &tracked(), kept));
        }
    });
    println!("worst {most}, mean {}, over updates {most_exact}", sum / 976.0);
    assert!(most < 0.0095 && most_exact < 0.0095, "{most} {most_exact}");
    assert!(sum / 976.0 < 0.0085, "{sum}");
}

/// Early snapshots neither push out those that matter nor leave more than 20.
///
/// At steps up to 10,000 the error is below 7%, and without early ones up to 45%. From step 25,000 on it is below 1%.
#[test]
fn early_snapshots_do_not_push_out_those_that_matter() {
    let schedule = Schedule::default();
    let mut kept: Vec<u64> = Vec::new();
    let mut early: f64 = 0.0;
    let mut late: Vec<f64> = Vec::new();
    for step in schedule.snapshots(1_000_000) {
        kept.push(step);
        let surplus = Retention::default().surplus(&tracked(), 10, &kept, 20);
        kept.retain(|step| !surplus.contains(step));
        if (1000..=10_000).contains(&step) {
            early = early.max(worst_dense(&tracked(), &kept));
        } else if step >= 25_000 {
            late.push(worst_dense(&tracked(), &kept));
        }
    }
    let worst = late.iter().copied().fold(0.0, f64::max);
    let mean = late.iter().sum::<f64>() / late.len() as f64;
    println!("early {early}, worst {worst}, mean {mean}");
    assert!(early < 0.07 && worst < 0.01 && mean < 0.009, "{early} {worst} {mean}");
    assert_eq!(kept.len(), 20);
}

/// Compares with a solve without each candidate in turn.
#[test]
fn dropped_snapshot_leaves_the_smallest_worst_error() {
    for (steps, range) in [((1..=21).map(|i| 1000 * i).collect::<Vec<u64>>(), (0.05, 0.28)), (uneven(), (0.1, 0.2))] {
        let targets = targets(range.0, range.1, TARGETS);
        let without = |dropped: usize| {
            let left: Vec<u64> = steps.iter().enumerate().filter(|(i, _)| *i != dropped).map(|(_, s)| *s).collect();
            let system = System::closed_form(steps[steps.len() - 1], &sources(&tracked(), &left), 0.0).unwrap();
            let errors = targets.iter().map(|target| system.solve(target).unwrap().relative_error);
            errors.fold(0.0, f64::max)
        };
        let all: Vec<f64> = (0..steps.len() - 1).map(without).collect();
        let least = all.iter().copied().fold(f64::MAX, f64::min);
        let mut thinning = Thinning::new(&tracked(), targets.clone(), 10);
        steps.iter().for_each(|&step| thinning.push(step));
        let chosen = thinning.least_needed();
        assert!(all[chosen] <= least * (1.0 + 1e-4), "{chosen} leaves {}, {least} is possible", all[chosen]);
        // The errors from the inverse equal those of a solve without the step.
        for ((error, _), exact) in ConstrainedSolve::new(&thinning.products).errors_without().iter().zip(&all) {
            assert!((error.sqrt() / exact - 1.0).abs() < 1e-3, "{} is not {exact}", error.sqrt());
        }
    }
}

/// Compares with the rule applied to the steps alone, after each snapshot.
#[test]
fn training_keeps_what_the_rule_leaves_after_each_snapshot() {
    let with_exponential = [power(0.05), Profile::half_life(2000.0).unwrap()];
    let snapshots = Schedule::default().snapshots(60_000);
    for retention in [Retention::default(), Retention::Latest, Retention::Steps(vec![500, 9000, 20_000])] {
        for tracked in [tracked(), with_exponential.clone()] {
            let mut kept: Vec<u64> = Vec::new();
            let mut expected = Vec::new();
            for &step in &snapshots {
                kept.push(step);
                let surplus = retention.surplus(&tracked, 10, &kept, 12);
                kept.retain(|step| !surplus.contains(step));
                expected.push(kept.clone());
            }
            let mut seen = Vec::new();
            let last = retention.over_training(&tracked, 10, &snapshots, 12, |kept| seen.push(kept.to_vec()));
            assert_eq!((seen, last), (expected, kept), "{retention:?}");
        }
    }
}

#[test]
fn dense_errors_equal_those_of_a_solve() {
    for steps in [uneven(), (1..=15).map(|i| 1000 * i).collect()] {
        let targets = targets(0.06, 0.2, 5);
        let system = System::closed_form(steps[steps.len() - 1], &sources(&tracked(), &steps), 0.0).unwrap();
        let found = dense_errors(&tracked(), &targets, 10, &steps);
        for ((error, gain), target) in found.iter().zip(&targets) {
            let exact = system.solve(target).unwrap();
            assert!((error / exact.relative_error - 1.0).abs() < 1e-4, "{error} is not {}", exact.relative_error);
            assert!((gain / exact.noise_gain - 1.0).abs() < 1e-4, "{gain} is not {}", exact.noise_gain);
        }
    }
}

fn uneven() -> Vec<u64> {
    vec![500, 700, 1900, 3000, 3100, 5200, 8000, 8100, 9000, 12_000, 12_100]
}

#[test]
fn retention_beats_the_newest_with_four_profiles() {
    let tracked = [power(0.05), power(0.28), Profile::half_life(2000.0).unwrap(), Profile::beta(0.9999).unwrap()];
    let history = Schedule::default().updates(100_000).unwrap();
    train(&Retention::default(), &tracked, 1000, 100_000, 10, |kept| {
        if kept[kept.len() - 1] % 20_000 == 0 {
            let latest: Vec<u64> = (1..=10).map(|i| kept[kept.len() - 1] - 10_000 + 1000 * i).collect();
            let chosen = worst_over_updates(&history, &tracked, kept);
            let newest = worst_over_updates(&history, &tracked, &latest);
            assert!(chosen < 0.02 && chosen <= newest, "{kept:?}: {chosen}, the newest {newest}");
        }
    });
}

#[test]
fn retention_of_hundreds_of_steps_has_a_small_error() {
    let mut last = Vec::new();
    train(&Retention::default(), &tracked(), 1000, 1_000_000, 200, |kept| last = kept.to_vec());
    let error = worst_dense(&tracked(), &last);
    assert!(error < 1e-3, "{error}: {last:?}");
}

#[test]
fn latest_and_listed_steps_are_kept() {
    let steps = [1000, 2000, 3000, 4000, 5000];
    assert_eq!(Retention::Latest.surplus(&tracked(), 10, &steps, 2), [1000, 2000, 3000]);
    assert!(Retention::Latest.surplus(&tracked(), 10, &steps, 9).is_empty());
    let listed = Retention::Steps(vec![1500, 4000, 9000]);
    assert_eq!(listed.surplus(&tracked(), 10, &steps, 1), [1000, 3000]);
    assert_eq!(Retention::Steps(vec![]).surplus(&tracked(), 10, &steps, 20), [1000, 2000, 3000, 4000]);
}

#[test]
fn any_number_of_steps_can_be_kept() {
    let steps: Vec<u64> = (1..=12).map(|i| i * i).collect();
    for keep in 0..=12 {
        for one in [vec![power(0.1)], vec![Profile::beta(0.9).unwrap()], tracked().to_vec()] {
            let surplus = Retention::default().surplus(&one, 1, &steps, keep);
            assert_eq!(surplus.len(), 12 - keep.max(1), "{keep}");
            assert!(surplus.iter().all(|step| steps[..11].contains(step)), "{surplus:?}");
        }
    }
    assert!(Retention::default().surplus(&tracked(), 10, &[], 20).is_empty());
}

#[test]
fn invalid_ranges_and_empty_lists_are_an_error() {
    for (from, to) in [(0.0, 0.2), (0.2, 0.1), (0.1, 0.3), (f64::NAN, 0.2), (0.1, f64::NAN)] {
        let text = Retention::Range { from, to }.check().unwrap_err().to_string();
        assert!(text.contains("option retention") && text.contains("at most 0.288675"), "{text}");
    }
    assert!(Retention::Steps(vec![]).check().unwrap_err().to_string().contains("no step is listed"));
    assert!(Retention::default().check().is_ok() && Retention::Latest.check().is_ok());
}

#[test]
fn retention_survives_json() {
    for (retention, text) in [
        (Retention::default(), r#"{"range":{"from":0.05,"to":0.28}}"#),
        (Retention::Latest, r#""latest""#),
        (Retention::Steps(vec![1000, 5000]), r#"{"steps":[1000,5000]}"#),
    ] {
        assert_eq!(serde_json::to_string(&retention).unwrap(), text);
        assert_eq!(serde_json::from_str::<Retention>(text).unwrap(), retention);
    }
}
