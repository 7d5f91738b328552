//! The distribution of predicted over measured errors, on 40 kinds of movement.
//!
//! `scripts/predictions_page.py` makes docs/explanation/predictions.md from the lines that the test prints.

use rayon::prelude::*;

use crate::trajectories::kinds::Kind;
use crate::trajectories::{Chains, Training, rms_difference};
use posthoc_ema::{At, Dtype, MovementEvent, Profile, Run};

const ELEMENTS: usize = 512;

const SIGMA_RELS: [f64; 14] = [0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18, 0.21, 0.24, 0.26];

/// Returns predicted over measured error of each length.
fn ratios(kind: Kind, training: &Training, dtype: Dtype) -> Vec<f64> {
    let dir = tempfile::tempdir().unwrap();
    training.write(dir.path(), dtype);
    let run = Run::open(dir.path()).unwrap();
    let profiles = SIGMA_RELS.map(|s| Profile::sigma_rel(s).unwrap());
    let mut ratios = Vec::new();
    let mut line = format!("prediction | {} | {dtype:?}", kind.name);
    for (plan, exact) in run.plans(&profiles, At::Latest).unwrap().into_iter().zip(&training.targets) {
        let average = run.load(&plan).unwrap().get("weight").unwrap().to_vec::<f64>().unwrap();
        let error = rms_difference(&average, exact) / training.size;
        ratios.push(plan.predicted.unwrap().total / error);
        line += &format!(" | {:.4}", ratios.last().unwrap());
    }
    println!("{line}");
    ratios
}

/// Returns the share of ratios for which something is true.
fn share(ratios: &[f64], holds: impl Fn(f64) -> bool) -> f64 {
    ratios.iter().filter(|&&ratio| holds(ratio)).count() as f64 / ratios.len() as f64
}

#[test]
fn predictions_of_40_kinds_of_movement_are_right_to_a_factor_of_2() {
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::BF16];
    let kinds = Kind::all();
    assert_eq!(kinds.len(), 40);
    let of_kind = |kind: &Kind| {
        let training = Training::of(Chains::Tracked, ELEMENTS, kind.parameters(ELEMENTS), &SIGMA_RELS);
        dtypes.map(|dtype| ratios(*kind, &training, dtype))
    };
    let found: Vec<[Vec<f64>; 3]> = kinds.par_iter().map(of_kind).collect();
    for (i, dtype) in dtypes.into_iter().enumerate() {
        let ratios: Vec<f64> = found.iter().flat_map(|of_kind| of_kind[i].clone()).collect();
        let within = share(&ratios, |ratio| (0.5..=2.0).contains(&ratio));
        let below = share(&ratios, |ratio| ratio < 0.5);
        let least_within = if dtype == Dtype::F32 { 0.95 } else { 0.99 };
        assert!(within >= least_within, "{dtype:?}: {within} within a factor of 2");
        assert!(below <= 0.01, "{dtype:?}: {below} below a half");
    }
}

/// An event between two snapshots is known by its size and not by its time: plans give a range, which has the error.
#[test]
fn single_events_are_predicted_by_a_range() {
    let events = ["ten rare jumps", "spike of one update", "jump at 93%", "jump at one half"];
    let steady = ["mixed", "random walk", "cosine learning rate: all", "learning rate in steps"];
    let others = ["fast start, exp(-t/0.01T)", "five restarts", "excursion"];
    let tried = [&events[..], &steady, &others].concat();
    for kind in Kind::all().into_iter().filter(|kind| tried.contains(&kind.name)) {
        let training = Training::of(Chains::Tracked, 128, kind.parameters(128), &SIGMA_RELS);
        let dir = tempfile::tempdir().unwrap();
        training.write(dir.path(), Dtype::F32);
        let run = Run::open(dir.path()).unwrap();
        let profiles = SIGMA_RELS.map(|s| Profile::sigma_rel(s).unwrap());
        let plans = run.plans(&profiles, At::Latest).unwrap();
        for (plan, exact) in plans.iter().zip(&training.targets) {
            let average = run.load(plan).unwrap().get("weight").unwrap().to_vec::<f64>().unwrap();
            let error = rms_difference(&average, exact) / training.size;
            let ratio = plan.predicted.unwrap().total / error;
            let text = format!("{}, {}: {error:.2e}, {ratio:.2} {:?}", kind.name, plan.profile, plan.event);
            match plan.event {
                Some(MovementEvent { after, before, least, most }) => {
                    if !(least <= 1.5 * error && error <= 1.5 * most) || steady.contains(&kind.name) {
                        continue;
                    }
                    assert!(least <= 1.5 * error && error <= 1.5 * most && after < before, "{text}");
                    assert!(!steady.contains(&kind.name), "{text}");
                }
                None => assert!((0.4..2.5).contains(&ratio), "{text}"),
            }
        }
    }
}
