//! Tests of early snapshots, whose times grow by a factor.

use std::path::Path;

use super::*;
use crate::planning::Forecast;
use crate::snapshot::STATE_FILE;
use crate::tracker::Options;

/// Returns the steps of the stored snapshots.
fn stored(dir: &Path) -> Vec<u64> {
    let run = Run::open(dir).unwrap();
    run.snapshots().iter().filter(|snapshot| snapshot.id.index == 0).map(|snapshot| snapshot.id.step).collect()
}

fn options(dir: &Path) -> Options {
    PostHocEma::options(dir).max_checkpoints(100)
}

const EARLY: [u64; 13] = [100, 120, 140, 170, 210, 250, 300, 360, 430, 520, 620, 740, 890];

#[test]
fn new_run_stores_early_snapshots() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = options(&dir).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 1005);
    assert_eq!(stored(&dir), [&EARLY[..], &[1000]].concat());
}

/// A short training is served to the error of the plan, and without early snapshots it is not.
#[test]
fn short_training_is_averaged_to_a_few_percent() {
    let error = |growth: Option<f64>| {
        let (_temp, dir) = scratch();
        let weight = |step: u64| vec![("w", vec![step as f32 / 1000.0])];
        let mut ema = PostHocEma::options(&dir).snapshot_growth(growth).create(&weight(0)).unwrap();
        for step in 1..=1000 {
            ema.update(&weight(step)).unwrap();
        }
        let profile = Profile::sigma_rel(0.15).unwrap();
        let trajectory: Vec<_> = (1..=100).map(|i| (10 * i, vec![i as f64 / 100.0])).collect();
        let exact = direct(&trajectory, &profile, 1000);
        largest_difference(&floats(&ema.synthesize(profile).unwrap()), &exact)
    };
    assert!(error(Some(1.2)) < 0.01, "{}", error(Some(1.2)));
    assert!(error(None) > 0.1, "{}", error(None));
}

#[test]
fn resume_at_any_step_stores_the_same_early_snapshots() {
    for stop in [1, 99, 100, 101, 119, 125, 889, 890, 999] {
        let (_temp, dir) = scratch();
        let mut walk = Walk::new(3);
        let mut ema = options(&dir).create(&walk.model).unwrap();
        train(&mut ema, &mut walk, stop);
        ema.save().unwrap();
        drop(ema);
        let mut ema = options(&dir).resume(&walk.model).unwrap();
        train(&mut ema, &mut walk, 1000 - stop);
        assert_eq!(stored(&dir), [&EARLY[..], &[1000]].concat(), "stopped at {stop}");
    }
}

/// The live state of an older version has no factor, as that of a run without early snapshots.
#[test]
fn resumed_run_of_an_older_version_stores_no_early_snapshots() {
    for off in [None, Some(0.0)] {
        let (_temp, dir) = scratch();
        let mut walk = Walk::new(3);
        let mut ema = options(&dir).snapshot_growth(off).create(&walk.model).unwrap();
        train(&mut ema, &mut walk, 150);
        ema.save().unwrap();
        drop(ema);
        let state = std::fs::read(dir.join(STATE_FILE)).unwrap();
        assert!(!String::from_utf8_lossy(&state).contains("snapshot_growth"));
        let mut ema = options(&dir).resume(&walk.model).unwrap();
        train(&mut ema, &mut walk, 850);
        assert_eq!(stored(&dir), [1000]);
        // The option switches them on for the rest.
        ema.save().unwrap();
        drop(ema);
        let mut ema = options(&dir).snapshot_growth(1.2).resume(&walk.model).unwrap();
        train(&mut ema, &mut walk, 1000);
        assert_eq!(stored(&dir), [1000, 1070, 1280, 1540, 1850, 2000]);
    }
}

#[test]
fn early_snapshots_on_a_jumping_clock_are_at_the_first_call_after_their_time() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = options(&dir).create(&walk.model).unwrap();
    for call in 1..=40 {
        ema.update_at(32 * call, walk.step()).unwrap();
    }
    ema.flush().unwrap();
    let times: Vec<u64> = [&EARLY[..], &[1000, 1070, 1280]].concat();
    let mut expected: Vec<u64> = times.iter().map(|time| time.next_multiple_of(32)).collect();
    expected.dedup();
    assert_eq!(stored(&dir), expected);
}

#[test]
fn latest_retention_drops_early_snapshots() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let options = PostHocEma::options(&dir).retention(Retention::Latest).max_checkpoints(3).checkpoint_every(200);
    let mut ema = options.create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 1600);
    assert_eq!(stored(&dir), [1200, 1400, 1600]);
}

#[test]
fn listed_steps_keep_the_first_snapshot_at_or_after_them() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let retention = Retention::Steps(vec![150, 1000]);
    let mut ema = PostHocEma::options(&dir).retention(retention).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 1290);
    assert_eq!(stored(&dir), [170, 1000, 1280]);
}

#[test]
fn forecast_lists_the_plan_of_the_run() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(200).max_checkpoints(8).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 1600);
    let schedule = Schedule { checkpoint_every: 200, ..Schedule::default() };
    let (retention, tracked) = (Retention::default(), ema.profiles().to_vec());
    let forecast = Forecast { schedule, steps: 1600, keep: 8, retention, tracked };
    let profile = [Profile::sigma_rel(0.15).unwrap()];
    let predicted = forecast.plans(&profile, At::Latest).unwrap().remove(0);
    let plan = Run::open(&dir).unwrap().plans(&profile, At::Latest).unwrap().remove(0);
    assert_eq!((&plan.weights, plan.relative_error), (&predicted.weights, predicted.relative_error));
    assert_eq!(plan.weights.len(), 16);
}

/// A training that evaluates one target again and again logs its large error once, and another target's once.
#[test]
fn inaccurate_average_is_logged_once() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let lines = log::logged(|| {
        let mut ema = options(&dir).snapshot_growth(None).create(&walk.model).unwrap();
        for _ in 0..3 {
            train(&mut ema, &mut walk, 300);
            ema.synthesize(Profile::sigma_rel(0.15).unwrap()).unwrap();
            ema.swap_in(Profile::sigma_rel(0.15).unwrap(), &mut walk.model).unwrap().restore().unwrap();
            ema.plan(Profile::sigma_rel(0.2).unwrap()).unwrap();
        }
        train(&mut ema, &mut walk, 100);
        let run = Run::open(&dir).unwrap();
        let plan = run.plan(Profile::sigma_rel(0.2).unwrap(), At::Latest).unwrap();
        run.load(&plan).unwrap();
        run.load(&plan).unwrap();
    });
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("WARN sigma_rel 0.15 at step 300 has a relative error of"), "{lines:?}");
    assert!(lines[1].starts_with("WARN sigma_rel 0.2 at step 1000 has") && lines[1].contains("too few"), "{lines:?}");
}
