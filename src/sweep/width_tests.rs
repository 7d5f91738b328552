//! Tests of refinements that are evaluated several at a time.

use super::*;
use crate::math::Profile;

fn power(sigma_rel: f64) -> Profile {
    Profile::sigma_rel(sigma_rel).unwrap()
}

fn length(profile: &Profile) -> f64 {
    profile.family().unwrap().1
}

/// `0.02, 0.04, ..., 0.28`.
fn list() -> Vec<Profile> {
    (1..=14).map(|i| power(0.02 * f64::from(i))).collect()
}

/// Runs a search whose evaluations end in reverse order if `is_reversed`, and returns it with the number of rounds of
/// refinements.
fn run(mut sweep: Sweep, is_reversed: bool, function: &dyn Fn(f64) -> f64) -> (Sweep, usize) {
    let mut rounds = 0;
    loop {
        let batch = sweep.next(20, &|profile| (0.01..0.28).contains(&length(profile)));
        if batch.is_empty() {
            return (sweep, rounds);
        }
        rounds += usize::from(!sweep.trials().is_empty());
        let mut ended = batch.clone();
        if is_reversed {
            ended.reverse();
        }
        for profile in ended {
            assert!(sweep.trial(&profile).is_none(), "{profile} is evaluated twice");
            let score = function(length(&profile));
            sweep.record(profile, TrialOutcome::Score(score), TrialMetrics::default());
            sweep.arrange(&batch);
        }
    }
}

/// The best is within the range that even cuts leave of two intervals of the list, as docs/how-to/evaluate.md says.
#[test]
fn refinements_at_a_time_narrow_the_range_in_fewer_rounds() {
    for (width, refine, rounds, left) in [
        (1, 6, 6, 0.145),
        (2, 6, 3, 0.125),
        (2, 8, 4, 0.0625),
        (4, 6, 2, 1.0 / 6.0),
        (4, 12, 3, 1.0 / 27.0),
        (8, 16, 2, 0.04),
        (9, 9, 1, 0.2),
    ] {
        for i in 0..60 {
            let optimum = 0.045 + 0.0036 * f64::from(i);
            for function in [|x: f64| x * x, |x: f64| x.abs(), |x: f64| (40.0 * x).exp() - 40.0 * x] {
                let sweep = Sweep::new(&list(), Goal::Minimize, refine).unwrap().with_width(width);
                let (sweep, taken) = run(sweep, false, &|x| function(x - optimum));
                let found = length(&sweep.best().unwrap().profile);
                let range = 0.04 * left;
                assert!((found - optimum).abs() <= 1.01 * range, "{width} at a time, {refine}: {found} of {optimum}");
                assert_eq!((sweep.trials().len(), taken), (14 + refine, rounds), "{width} at a time");
            }
        }
    }
}

#[test]
fn trials_do_not_depend_on_the_order_in_which_evaluations_end() {
    for width in 2..7 {
        for optimum in [0.01, 0.1, 0.131, 0.29] {
            let search = |is_reversed| {
                let sweep = Sweep::new(&list()[3..8], Goal::Minimize, 9).unwrap().with_width(width);
                run(sweep, is_reversed, &|x| (x - optimum).abs()).0
            };
            assert_eq!(search(true).trials(), search(false).trials(), "{width} at a time, {optimum}");
        }
    }
}

/// Half of the steps at an edge go outwards, each as if the one before were the best.
#[test]
fn optimum_beyond_the_edge_is_found_several_at_a_time() {
    for width in 1..7 {
        for optimum in [0.03, 0.06, 0.09, 0.17, 0.22, 0.27] {
            let sweep = Sweep::new(&[0.1, 0.12, 0.14].map(power), Goal::Minimize, 24).unwrap().with_width(width);
            let (sweep, _) = run(sweep, false, &|x| (x - optimum).powi(2));
            let found = length(&sweep.best().unwrap().profile);
            assert!((found - optimum).abs() <= 0.004 && sweep.edge().is_none(), "{width}, {optimum}: {found}");
        }
    }
}

/// Two metrics share the refinements of a round.
#[test]
fn metrics_are_refined_side_by_side() {
    let metrics = ["a", "b:max"].map(|metric| Metric::parse(metric).unwrap());
    let mut sweep = Sweep::new(&list(), Goal::Minimize, 4).unwrap().with_metrics(&metrics).unwrap().with_jobs(4);
    let mut rounds = Vec::new();
    loop {
        let batch = sweep.next(20, &|_| false);
        if batch.is_empty() {
            break;
        }
        rounds.push(batch.len());
        for profile in batch {
            let x = length(&profile);
            let scores = vec![(x - 0.07).abs(), -(x - 0.21).abs()];
            sweep.record_repeat(profile, 1, Ok(scores.into()), TrialMetrics::default());
        }
    }
    assert_eq!(rounds, [14, 4, 4]);
    for (metric, optimum) in [(0, 0.07), (1, 0.21)] {
        let found = length(&sweep.best_by(metric).unwrap().profile);
        assert!((found - optimum).abs() <= 0.01, "{found}");
    }
}

#[test]
fn repeats_of_an_average_are_work_for_the_jobs() {
    for (repeats, width) in [(1, 4), (2, 2), (3, 2), (4, 1), (7, 1)] {
        let mut sweep = Sweep::new(&list(), Goal::Minimize, 4).unwrap().with_repeats(repeats).with_jobs(4);
        for profile in list() {
            for repeat in 1..=repeats {
                let score = (length(&profile) - 0.1).abs();
                sweep.record_repeat(profile.clone(), repeat, Ok(score.into()), TrialMetrics::default());
            }
        }
        assert_eq!(sweep.next(20, &|_| false).len(), width, "{repeats} repeats");
        assert_eq!(sweep.next(1, &|_| false).len(), 1);
    }
}
