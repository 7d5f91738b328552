//! Errors predicted before a training, from a named movement or from another run, against those measured after it.

use std::f64::consts::PI;
use std::path::Path;

use posthoc_ema::math::{Chain, Schedule};
use posthoc_ema::{At, Dtype, Forecast, NamedMovement, Noise, PostHocEma, Profile, Retention, Run};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const ELEMENTS: usize = 128;

const SIGMA_RELS: [f64; 4] = [0.06, 0.1, 0.15, 0.21];

/// Movement over a training. Functions are of the share of the training that is over.
#[derive(Clone, Copy)]
struct Moving {
    name: &'static str,
    /// Place on lines of random slopes.
    line: fn(f64) -> f64,
    /// Size of a random walk.
    walk: fn(f64) -> f64,
    /// Noise of each update.
    noise: f64,
}

const STILL: Moving = Moving { name: "", line: |_| 0.0, walk: |_| 0.0, noise: 0.0 };

fn cosine(s: f64) -> f64 {
    0.5 * (1.0 + (PI * s).cos())
}

fn profiles() -> [Profile; 4] {
    SIGMA_RELS.map(|length| Profile::sigma_rel(length).unwrap())
}

fn normal(random: &mut ChaCha8Rng) -> f64 {
    ((0..4).map(|_| random.random::<f64>() - 0.5).sum::<f64>()) * 3f64.sqrt()
}

/// Returns the forecast of a training.
fn forecast(steps: u64, update_every: u64, checkpoint_every: u64) -> Forecast {
    let schedule = Schedule { update_every, checkpoint_every, ..Schedule::default() };
    let tracked = [0.05, 0.28].map(|length| Profile::sigma_rel(length).unwrap()).to_vec();
    Forecast { schedule, steps, keep: 100, retention: Retention::default(), tracked }
}

fn rms(values: impl Iterator<Item = f64>) -> f64 {
    (values.map(|value| value * value).sum::<f64>() / ELEMENTS as f64).sqrt()
}

/// Trains as a forecast says; returns the exact average of each length, and the size of the weights at the end.
fn train(dir: &Path, forecast: &Forecast, moving: Moving, seed: u64) -> (Vec<Vec<f64>>, f64) {
    let Forecast { steps, schedule: Schedule { update_every, checkpoint_every, .. }, .. } = *forecast;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut draw = |count: usize| (0..count).map(|_| normal(&mut random)).collect::<Vec<f64>>();
    let (start, slopes) = (draw(ELEMENTS), draw(ELEMENTS));
    let mut walked = vec![0.0; ELEMENTS];
    let mut model = vec![("w", start.clone())];
    let options = PostHocEma::options(dir).update_every(update_every).checkpoint_every(checkpoint_every);
    let mut ema = options.max_checkpoints(100).create(&model).unwrap();
    let times: Vec<u64> = (1..=steps / update_every).map(|k| k * update_every).collect();
    let weights = profiles().map(|profile| Chain::Tracked(profile).weights(&times));
    let mut exact = vec![vec![0.0; ELEMENTS]; SIGMA_RELS.len()];
    for (k, &time) in times.iter().enumerate() {
        let share = time as f64 / steps as f64;
        let step = (moving.walk)(share) * (1.0 / times.len() as f64).sqrt();
        let (steps, noise) = (draw(ELEMENTS), draw(ELEMENTS));
        for i in 0..ELEMENTS {
            walked[i] += step * steps[i];
            model[0].1[i] = start[i] + slopes[i] * (moving.line)(share) + walked[i] + moving.noise * noise[i];
        }
        (0..update_every).for_each(|_| assert!(ema.update(&model).is_ok()));
        for (exact, weights) in exact.iter_mut().zip(&weights) {
            exact.iter_mut().zip(&model[0].1).for_each(|(sum, value)| *sum += weights[k] * value);
        }
    }
    ema.finish().unwrap();
    (exact, rms(model[0].1.iter().copied()))
}

/// Returns the errors of the averages of a run.
fn measured(dir: &Path, exact: &[Vec<f64>], size: f64) -> Vec<f64> {
    let run = Run::open(dir).unwrap();
    let error = |(plan, exact): (_, &Vec<f64>)| {
        let average = run.load(plan).unwrap().get("w").unwrap().to_vec::<f64>().unwrap();
        rms(average.iter().zip(exact).map(|(a, b)| a - b)) / size
    };
    run.plans(&profiles(), At::Latest).unwrap().iter().zip(exact).map(error).collect()
}

#[test]
fn forecast_like_a_run_predicts_another_training() {
    let kinds = [
        Moving { name: "walk", walk: |_| 0.4, ..STILL },
        Moving { name: "cosine", line: |s| 0.3 * (s + (PI * s).sin() / PI), walk: |s| 0.1 * cosine(s), ..STILL },
        Moving { name: "cosine walk", walk: |s| 0.3 * cosine(s), ..STILL },
        Moving { name: "converge", line: |s| 0.5 * (-s / 0.2).exp(), ..STILL },
        Moving { name: "converge, then noise", line: |s| 0.5 * (-s / 0.2).exp(), noise: 0.01, ..STILL },
    ];
    let (old, new) = (forecast(600, 1, 30), forecast(2000, 1, 80));
    for moving in kinds {
        let temp = tempfile::tempdir().unwrap();
        let (first, second) = (temp.path().join("first"), temp.path().join("second"));
        train(&first, &old, moving, 3);
        let run = Run::open(&first).unwrap();
        let plans = run.plans_like(&new, &profiles(), At::Latest, Noise::Off, Dtype::F32).unwrap();
        let coarse = run.plans_like(&new, &profiles(), At::Latest, Noise::Off, Dtype::BF16).unwrap();
        let (exact, size) = train(&second, &new, moving, 8);
        for ((plan, coarse), error) in plans.iter().zip(&coarse).zip(measured(&second, &exact, size)) {
            let ratio = plan.predicted.unwrap().total / error;
            assert!((0.5..2.0).contains(&ratio), "{}, {}: {ratio} of {error}", moving.name, plan.profile);
            assert!(coarse.predicted.unwrap().rounding > 1e3 * plan.predicted.unwrap().rounding);
        }
    }
}

#[test]
fn named_movement_predicts_a_training_that_moves_so() {
    let kinds = [
        Moving { name: "walk:0.4", walk: |_| 0.4, ..STILL },
        Moving { name: "cosine:0.3", walk: |s| 0.3 * cosine(s) * (8f64 / 3.0).sqrt(), ..STILL },
        Moving { name: "line:0.5", line: |s| 0.5 * s, ..STILL },
        Moving { name: "converge:0.5", line: |s| 0.5 * (-s / 0.2).exp(), ..STILL },
        Moving { name: "walk:0.1+noise:0.05", walk: |_| 0.1, noise: 0.05, ..STILL },
    ];
    let new = forecast(2000, 1, 80);
    for moving in kinds {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("run");
        let movement: NamedMovement = moving.name.parse().unwrap();
        let plans = new.plans_moving(&profiles(), At::Latest, Noise::Off, &movement, Dtype::F32).unwrap();
        let (exact, size) = train(&dir, &new, moving, 8);
        let stored = Run::open(&dir).unwrap().plans(&profiles(), At::Latest).unwrap();
        for ((plan, stored), error) in plans.iter().zip(&stored).zip(measured(&dir, &exact, size)) {
            let ratio = plan.predicted.unwrap().total * plan_scale(size) / error;
            assert!((0.5..2.0).contains(&ratio), "{}, {}: {ratio} of {error}", moving.name, plan.profile);
            assert_eq!((plan.relative_error, plan.no_prediction), (stored.relative_error, None));
        }
    }
}

/// Returns the factor from sizes relative to the start, which is 1, to sizes relative to the end.
fn plan_scale(size: f64) -> f64 {
    1.0 / size
}

/// Bits of 16 leave a rounding of about their own size, amplified by the noise gain; of still weights it stays.
#[test]
fn named_movement_predicts_the_rounding() {
    let forecast = forecast(2000, 1, 80);
    let plans = |movement: &str, dtype: Dtype| {
        let movement: NamedMovement = movement.parse().unwrap();
        forecast.plans_moving(&profiles()[..1], At::Latest, Noise::Off, &movement, dtype).unwrap().remove(0)
    };
    let moving = plans("walk:1", Dtype::BF16);
    let independent = moving.noise_gain * posthoc_ema::rounding(Dtype::BF16);
    let rounding = moving.predicted.unwrap().rounding;
    assert!((rounding / independent - 1.0).abs() < 0.2, "{rounding} is not {independent}");
    let still = plans("walk:1e-9", Dtype::BF16).predicted.unwrap().rounding;
    assert!(still < posthoc_ema::rounding(Dtype::BF16) * 1.2, "{still}");
}

#[test]
fn run_that_shows_no_movement_is_an_error() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let model = vec![("w", vec![1.0f32; 8])];
    let mut ema = PostHocEma::options(&dir).snapshot_growth(None).create(&model).unwrap();
    (0..20).for_each(|_| assert!(ema.update(&model).is_ok()));
    ema.finish().unwrap();
    let plans =
        Run::open(&dir).unwrap().plans_like(&forecast(2000, 1, 80), &profiles(), At::Latest, Noise::Off, Dtype::F32);
    let error = plans.unwrap_err().to_string();
    assert!(error.contains("like") && error.contains("those of 3 steps do"), "{error}");
}
