//! Imports of averages of hand-made trainings, compared with loops in f64.

mod layouts;
mod recorded;
mod refused;

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use tempfile::TempDir;

use super::*;
use crate::import::tests::average;
use crate::math::Ramp;
use crate::planning::{At, Plan};
use crate::run::Run;

/// EMA of a training, run step by step.
#[derive(Clone, Copy)]
pub(super) struct EmaLoop {
    pub beta: f64,
    /// Decay of update `k = 1, 2, ...`, before it is limited to `beta`.
    pub ramp: fn(f64) -> f64,
    /// Step of the copy.
    pub start: u64,
    pub every: u64,
}

/// Ramp of an EMA without one.
pub(super) fn no_ramp(_: f64) -> f64 {
    1.0
}

impl EmaLoop {
    pub(super) fn constant(beta: f64) -> EmaLoop {
        EmaLoop { beta, ramp: no_ramp, start: 0, every: 1 }
    }

    /// Returns the weight of each step's parameters, those of step 0 included, in the average after `steps` steps.
    pub(super) fn response(&self, steps: u64) -> Vec<f64> {
        let mut weights = vec![0.0; steps as usize + 1];
        let mut kept = 1.0;
        for step in (self.start + 1..=steps).rev().filter(|step| self.is_update(*step)) {
            let beta = self.beta(step);
            weights[step as usize] = kept * (1.0 - beta);
            kept *= beta;
        }
        weights[self.start as usize] = kept;
        weights
    }

    /// Returns the average of element `i` after each step.
    pub(super) fn averages(&self, steps: u64, i: usize) -> Vec<f64> {
        let mut average = value(0, i);
        let mut averages = vec![average];
        for step in 1..=steps {
            if step <= self.start {
                average = value(step, i);
            } else if self.is_update(step) {
                let beta = self.beta(step);
                average = beta * average + (1.0 - beta) * value(step, i);
            }
            averages.push(average);
        }
        averages
    }

    fn is_update(&self, step: u64) -> bool {
        (step - self.start).is_multiple_of(self.every)
    }

    fn beta(&self, step: u64) -> f64 {
        (self.ramp)(((step - self.start) / self.every) as f64).min(self.beta)
    }
}

/// Parameter `i` after a step. The first update changes nothing.
pub(super) fn value(step: u64, i: usize) -> f64 {
    let t = step.max(1) as f64;
    match i {
        0 => t / 400.0,
        1 => (t / 80.0).sin(),
        _ => (t / 30.0).cos() / (1.0 + t / 300.0),
    }
}

pub(super) const ELEMENTS: usize = 3;

/// Saves one tensor of f64.
pub(super) fn save(path: &Path, values: [f64; ELEMENTS]) {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(safetensors::Dtype::F64, vec![ELEMENTS], &bytes).unwrap();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    safetensors::serialize_to_file([("w", view)], None, path).unwrap();
}

/// Saves the average at each of the steps, in a file that `path` names within the folder `out`.
pub(super) fn save_averages(temp: &TempDir, ema: &EmaLoop, steps: &[u64], path: &dyn Fn(u64) -> String) {
    let averages: Vec<Vec<f64>> = (0..ELEMENTS).map(|i| ema.averages(*steps.last().unwrap(), i)).collect();
    for &step in steps {
        let values = std::array::from_fn(|i| averages[i][step as usize]);
        save(&temp.path().join("out").join(path(step)), values);
    }
}

/// Saves the raw weights at each of the steps, in a folder `raw` of each step's folder.
fn save_raw(temp: &TempDir, steps: &[u64]) {
    for &step in steps {
        let path = temp.path().join(format!("out/step-{step}/raw/model.safetensors"));
        save(&path, std::array::from_fn(|i| value(step, i)));
    }
}

/// Saves the average as `ema-STEP.safetensors` at each of the steps.
pub(super) fn files(ema: &EmaLoop, steps: &[u64]) -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    save_averages(&temp, ema, steps, &|step| format!("ema-{step}.safetensors"));
    temp
}

/// Returns the weights of raw parameters.
fn raw(step: u64) -> Vec<f64> {
    let mut weights = vec![0.0; step as usize + 1];
    weights[step as usize] = 1.0;
    weights
}

pub(super) fn options(decay: EmaDecay, every: u64) -> ImportAverages {
    ImportAverages { decays: vec![AverageDecay::Ema(decay)], update_every: Some(every), ..Default::default() }
}

/// Imports the folder `out`; returns the run.
pub(super) fn imported(import: &ImportAverages, temp: &TempDir) -> (PathBuf, ImportReport) {
    let dir = temp.path().join("run");
    let found = import.open(temp.path().join("out")).unwrap();
    let report = found.write(&dir, None).unwrap();
    (dir, report)
}

/// Returns the weight of each step in a blend, from the loops that made the sources.
fn blended(plan: &Plan, response: &dyn Fn(usize, u64) -> Vec<f64>) -> Vec<f64> {
    let mut weights = vec![0.0; plan.at as usize + 1];
    for used in &plan.weights {
        for (sum, weight) in weights.iter_mut().zip(response(used.index, used.step)) {
            *sum += used.weight * weight;
        }
    }
    weights
}

/// Checks a synthesis against the weights that its plan implies, the plan's error against that of these weights, and
/// the synthesis against the exact average within that error.
pub(super) fn check(dir: &Path, targets: &[Profile], rounding: f64, response: &dyn Fn(usize, u64) -> Vec<f64>) -> f64 {
    let run = Run::open(dir).unwrap();
    let times = run.history().unwrap().times();
    let mut worst: f64 = 0.0;
    for target in targets {
        let plan = run.plan(target.clone(), At::Latest).unwrap();
        worst = worst.max(plan.relative_error);
        let weights = blended(&plan, response);
        check_error(&plan, &times, &weights);
        let loaded = run.load(&plan).unwrap();
        let elements: Vec<f64> = match loaded.get("w").unwrap().to_vec::<f64>() {
            Some(elements) => elements,
            None => loaded.get("w").unwrap().to_vec::<f32>().unwrap().iter().map(|&x| f64::from(x)).collect(),
        };
        for (i, &element) in elements.iter().enumerate() {
            let implied: f64 = weights.iter().enumerate().map(|(t, w)| w * value(t as u64, i)).sum();
            let tolerance = rounding * plan.noise_gain.max(1.0);
            assert!((element - implied).abs() <= tolerance, "{target}, {i}: {element} is not {implied}");
            let (exact, apart) = average(&plan, &times, |t| value(t as u64, i));
            let difference = (element - exact).abs();
            assert!(difference <= apart + tolerance, "{target}, {i}: {element} is {difference} from {exact}");
        }
    }
    worst
}

/// Compares the predicted error with that of the weights on the updates.
fn check_error(plan: &Plan, times: &[u64], weights: &[f64]) {
    let mut before = 0;
    let (mut apart, mut norm) = (0.0, 0.0);
    for &time in times.iter().filter(|time| **time <= plan.at) {
        let target = plan.profile.cumulative(time as f64, plan.at as f64)
            - plan.profile.cumulative(before as f64, plan.at as f64);
        let own: f64 = (before..=time)
            .filter(|&t| t == time || times.binary_search(&t).is_err())
            .map(|t| weights[t as usize])
            .sum();
        let interval = (time - before) as f64;
        apart += (own - target).powi(2) / interval;
        norm += target.powi(2) / interval;
        before = time;
    }
    let error = (apart / norm).sqrt();
    let predicted = plan.relative_error;
    assert!((error - predicted).abs() <= 1e-6 * predicted + 1e-9, "{}: {predicted} is not {error}", plan.profile);
}

/// Returns the steps of files that are close together at first.
pub(super) fn steps(first: u64, last: u64) -> Vec<u64> {
    let mut steps = Vec::new();
    let mut step = first as f64;
    while step < last as f64 {
        steps.push(step.round() as u64);
        step = (step * 1.15).max(step + 3.0).min(step + 30.0);
    }
    steps.push(last);
    steps
}

fn targets() -> Vec<Profile> {
    let power = |sigma_rel: f64| Profile::sigma_rel(sigma_rel).unwrap();
    vec![power(0.1), power(0.25), Profile::beta(0.98).unwrap()]
}

#[test]
fn synthesis_from_a_series_of_averages_is_within_the_predicted_error() {
    let ratio = |k: f64| (1.0 + k) / (10.0 + k);
    let inverse = |k: f64| 1.0 - (1.0 + k).powf(-2.0 / 3.0);
    let exponential = |k: f64| 0.94 * (1.0 - (-k / 60.0).exp());
    let decay = |ramp| EmaDecay { beta: 0.94, floor: 0.0, ramp };
    let constant = EmaLoop::constant(0.94);
    for (ema, decay, after) in [
        (constant, decay(Ramp::Constant), None),
        (EmaLoop { start: 1, ..constant }, decay(Ramp::Constant), Some(0)),
        (EmaLoop { start: 51, ..constant }, decay(Ramp::Constant), Some(50)),
        (EmaLoop { start: 1, ramp: ratio, ..constant }, decay(Ramp::Ratio { offset: 10.0 }), Some(0)),
        (
            EmaLoop { start: 1, ramp: inverse, ..constant },
            decay(Ramp::InverseGamma { gamma: 1.0, power: 2.0 / 3.0 }),
            Some(0),
        ),
        (EmaLoop { ramp: exponential, ..constant }, decay(Ramp::Exponential { tau: 60.0 }), None),
    ] {
        let temp = files(&ema, &steps(ema.start + 10, 400));
        let import = ImportAverages { update_after_step: after, ..options(decay, 1) };
        let (dir, report) = imported(&import, &temp);
        assert_eq!(report.profiles, [Profile::beta(0.94).unwrap()]);
        let worst = check(&dir, &targets(), 1e-11, &|_, step| ema.response(step));
        assert!(worst < 0.7, "{decay:?}: {worst}");
    }
}

#[test]
fn updates_every_few_steps_keep_the_share_of_the_initial_weights() {
    for (start, after) in [(0, None), (1, Some(0)), (51, Some(50))] {
        let ema = EmaLoop { start, every: 10, ..EmaLoop::constant(0.9) };
        // Some files are between updates.
        let steps: Vec<u64> = (1..=8).map(|i| i * 50 + i % 3).collect();
        let temp = files(&ema, &steps);
        let (dir, report) =
            imported(&ImportAverages { update_after_step: after, ..options(EmaDecay::constant(0.9), 10) }, &temp);
        // The file of step 51 has the update at 50, or at 51.
        let first = if start == 0 { 50 } else { 51 };
        assert_eq!(report.steps[0], first);
        check(&dir, &targets(), 1e-11, &|_, step| ema.response(step));
    }
}

#[test]
fn several_averages_and_raw_weights_reach_more_lengths() {
    let steps = steps(10, 400);
    let loops = [EmaLoop::constant(0.94), EmaLoop::constant(0.98)];
    let temp = tempfile::tempdir().unwrap();
    for (name, ema) in [("short", &loops[0]), ("long", &loops[1])] {
        save_averages(&temp, ema, &steps, &|step| format!("step-{step}/{name}/model.safetensors"));
    }
    save_raw(&temp, &steps);
    let one = ImportAverages { keys: vec!["short".into()], ..options(EmaDecay::constant(0.94), 1) };
    let (dir, _) = imported(&one, &temp);
    let alone = check(&dir, &targets(), 1e-11, &|_, step| loops[0].response(step));
    fs::remove_dir_all(&dir).unwrap();
    let with_raw = ImportAverages { raw: Some("raw".into()), ..one.clone() };
    let (dir, report) = imported(&with_raw, &temp);
    assert_eq!((report.snapshots, report.profiles.len()), (2 * steps.len(), 2));
    assert_eq!(report.profiles[1].to_string(), "raw weights");
    let response = |index: usize, step| if index == 0 { loops[0].response(step) } else { raw(step) };
    let joined = check(&dir, &targets(), 1e-11, &response);
    assert!(joined < alone, "{joined} is not below {alone}");
    fs::remove_dir_all(&dir).unwrap();
    let decays = [0.94, 0.98].map(|beta| AverageDecay::Ema(EmaDecay::constant(beta))).to_vec();
    let both = ImportAverages { keys: vec!["short".into(), "long".into()], decays, ..with_raw };
    let (dir, report) = imported(&both, &temp);
    assert_eq!(report.snapshots, 3 * steps.len());
    let response = |index: usize, step| loops.get(index).map_or_else(|| raw(step), |ema| ema.response(step));
    let all = check(&dir, &targets(), 1e-11, &response);
    assert!(all < joined, "{all} is not below {joined}");
}

/// Raw weights between two updates are a step of their own.
#[test]
fn raw_weights_join_between_updates() {
    let ema = EmaLoop { start: 1, every: 10, ..EmaLoop::constant(0.9) };
    let temp = tempfile::tempdir().unwrap();
    let steps: Vec<u64> = (1..=8).map(|i| i * 50).collect();
    save_averages(&temp, &ema, &steps, &|step| format!("step-{step}/ema/model.safetensors"));
    save_raw(&temp, &steps);
    let import = ImportAverages {
        keys: vec!["ema".into()],
        raw: Some("raw".into()),
        update_after_step: Some(0),
        ..options(EmaDecay::constant(0.9), 10)
    };
    let (dir, report) = imported(&import, &temp);
    assert_eq!((report.steps[0], report.steps.len()), (50, 8));
    let response = |index: usize, step: u64| if index == 0 { ema.response(step) } else { raw(step) };
    check(&dir, &targets(), 1e-11, &response);
}
