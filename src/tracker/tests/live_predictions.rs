//! Tests of errors that are predicted during training, against measured ones.

use super::*;
use crate::planning::NoPrediction;

const ELEMENTS: usize = 256;

/// Parameters over a training of 2,000 steps.
struct Trained {
    random: rand_chacha::ChaCha8Rng,
    model: Vec<(&'static str, Vec<f32>)>,
}

impl Trained {
    fn new() -> Trained {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let start = (0..ELEMENTS).map(|_| random.random_range(-2.0..2.0)).collect();
        Trained { random, model: vec![("w", start)] }
    }

    /// Trains on, each element with random steps of a size; returns the trajectory of the updates.
    fn train(&mut self, ema: &mut PostHocEma, steps: u64, size: impl Fn(u64) -> f32) -> Vec<(u64, Vec<f64>)> {
        let mut trajectory = Vec::new();
        for _ in 0..steps {
            let size = size(ema.step());
            self.model[0].1.iter_mut().for_each(|value| *value += size * self.random.random_range(-1.0..1.0f32));
            if ema.update(&self.model).unwrap() != UpdateOutcome::Skipped {
                trajectory.push((ema.step(), self.model[0].1.iter().map(|&value| f64::from(value)).collect()));
            }
        }
        trajectory
    }
}

fn rms(values: impl Iterator<Item = f64>) -> f64 {
    (values.map(|value| value * value).sum::<f64>() / ELEMENTS as f64).sqrt()
}

fn lengths(all: &[f64]) -> Vec<Profile> {
    all.iter().map(|&length| Profile::sigma_rel(length).unwrap()).collect()
}

/// Plans amid a training, between two snapshots, are compared with averages that are made right then.
#[test]
fn error_predicted_now_is_measured_now() {
    let walk: fn(u64) -> f32 = |_| 0.02;
    let cosine: fn(u64) -> f32 = |step| 0.02 * (1.0 + (std::f32::consts::PI * step as f32 / 2000.0).cos());
    for size in [walk, cosine] {
        for until in [830, 1990] {
            let (_temp, dir) = scratch();
            let mut trained = Trained::new();
            let mut ema = PostHocEma::options(&dir).checkpoint_every(200).create(&trained.model).unwrap();
            let trajectory = trained.train(&mut ema, until, size);
            let profiles = lengths(&[0.03, 0.1, 0.15, 0.21]);
            let scale = rms(trajectory.last().unwrap().1.iter().copied());
            for plan in ema.plans(&profiles).unwrap() {
                assert_eq!((plan.at, plan.no_prediction), (until, None));
                let made = floats(&ema.synthesize(plan.profile.clone()).unwrap());
                let exact = direct(&trajectory, &plan.profile, until);
                let error = rms(made.iter().zip(&exact).map(|(a, b)| a - b)) / scale;
                let ratio = plan.predicted.unwrap().total / error;
                assert!((0.5..2.0).contains(&ratio), "{} at {until}: {ratio} of {error}", plan.profile);
            }
        }
    }
}

#[test]
fn plan_of_a_short_training_says_why_it_predicts_nothing() {
    let (_temp, dir) = scratch();
    let mut trained = Trained::new();
    let mut ema = PostHocEma::options(&dir).snapshot_growth(None).create(&trained.model).unwrap();
    trained.train(&mut ema, 500, |_| 0.02);
    let plan = ema.plan(Profile::sigma_rel(0.1).unwrap()).unwrap();
    assert_eq!((plan.predicted, plan.no_prediction), (None, Some(NoPrediction::FewSteps { steps: 1 })));
    let text = serde_json::json!(plan)["no_prediction"].as_str().unwrap().to_owned();
    assert!(text.contains("averages of 1 step ") && text.contains("checkpoint_every"), "{text}");
    // Two snapshots and the live averages are enough.
    trained.train(&mut ema, 1500, |_| 0.02);
    assert_eq!(
        ema.plan(Profile::sigma_rel(0.1).unwrap()).unwrap().no_prediction,
        Some(NoPrediction::FewSteps { steps: 2 })
    );
    trained.train(&mut ema, 10, |_| 0.02);
    assert!(ema.plan(Profile::sigma_rel(0.1).unwrap()).unwrap().predicted.is_some());
}

/// A frozen tensor that is not sampled whole shows nothing.
#[test]
fn weights_that_do_not_move_are_not_predicted() {
    let (_temp, dir) = scratch();
    let model = vec![("w", vec![1.0f32; 120_000])];
    let mut ema = PostHocEma::options(&dir).checkpoint_every(20).create(&model).unwrap();
    for _ in 0..100 {
        ema.update(&model).unwrap();
    }
    let plan = ema.plan(Profile::sigma_rel(0.1).unwrap()).unwrap();
    assert_eq!((plan.predicted, plan.no_prediction), (None, Some(NoPrediction::Still)));
}
