//! Tests of the tracker by identities and against naive oracles.

mod background;
mod checkpoint_meta;
mod extending;
mod faults;
mod filling;
mod growth;
mod live_predictions;
mod locks;
mod log;
mod non_finite;
mod rewind;
mod sharded;
mod storage;
mod swapping;
mod tensors;
mod threads;
mod unfinished;
mod writer;

use std::cell::Cell;
use std::path::PathBuf;

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use safetensors::Dtype;
use tempfile::TempDir;

use super::*;
use crate::compute::cpu::{Averages, Precision};
use crate::math::{Chain, Retention, Schedule, Window};
use crate::planning::At;
use crate::run::Run;
use crate::synthesis::{Output, WriteOptions};
use crate::tensor::{Tensor, Tensors};

/// Returns a directory for a run, which does not exist yet.
fn scratch() -> (TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    (temp, dir)
}

type Model = Vec<(&'static str, Vec<f32>)>;

const SIZES: [(&str, usize); 3] = [("a.weight", 37), ("b.weight", 5), ("c.bias", 1)];

/// Random walk with drift, like parameters in training.
struct Walk {
    random: rand_chacha::ChaCha8Rng,
    model: Model,
}

impl Walk {
    fn new(seed: u64) -> Walk {
        let model = SIZES.map(|(name, n)| (name, vec![1.0; n])).to_vec();
        Walk { random: rand_chacha::ChaCha8Rng::seed_from_u64(seed), model }
    }

    fn step(&mut self) -> &Model {
        for value in self.model.iter_mut().flat_map(|(_, values)| values) {
            *value += 0.02 * (self.random.random::<f32>() - 0.45);
        }
        &self.model
    }

    fn values(model: &Model) -> Vec<f64> {
        model.iter().flat_map(|(_, values)| values.iter().map(|&v| f64::from(v))).collect()
    }
}

/// Returns the running averages of any engine.
fn averages(ema: &PostHocEma) -> Vec<Averages> {
    ema.engine.values().unwrap().values().averages.to_vec()
}

fn floats(tensors: &Tensors) -> Vec<f64> {
    let values = tensors.iter().filter_map(|(_, tensor)| tensor.to_vec::<f32>());
    values.flatten().map(f64::from).collect()
}

/// Computes `sum_k w_k p_k` directly from the definition of a profile.
fn direct(trajectory: &[(u64, Vec<f64>)], profile: &Profile, at: u64) -> Vec<f64> {
    let mut sum = vec![0.0; trajectory[0].1.len()];
    let mut before = 0.0;
    let last = trajectory.iter().rposition(|(t, _)| *t <= at).unwrap();
    for (k, (time, values)) in trajectory[..=last].iter().enumerate() {
        let share = if k == last { 1.0 } else { profile.cumulative(*time as f64, at as f64) };
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += (share - before) * v);
        before = share;
    }
    sum
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |most, d| if d > most || d.is_nan() { d } else { most })
}

/// Trains for some steps, waits until all snapshots are stored, and returns the trajectory of the updates.
fn train(ema: &mut PostHocEma, walk: &mut Walk, steps: u64) -> Vec<(u64, Vec<f64>)> {
    let trajectory = train_on(ema, walk, steps);
    ema.flush().unwrap();
    trajectory
}

/// Trains for some steps without waiting for the snapshots, and returns the trajectory of the updates.
fn train_on(ema: &mut PostHocEma, walk: &mut Walk, steps: u64) -> Vec<(u64, Vec<f64>)> {
    let mut trajectory = Vec::new();
    for _ in 0..steps {
        let step = ema.update(walk.step()).unwrap();
        if step != UpdateOutcome::Skipped {
            trajectory.push((ema.step(), Walk::values(&walk.model)));
        }
    }
    trajectory
}

#[test]
fn tracker_is_send() {
    fn is_send<T: Send>() {}
    is_send::<PostHocEma>();
}

#[test]
fn running_average_equals_direct_sum_for_every_schedule() {
    for (every, after, checkpoint) in
        [(10, 0, 100), (7, 0, 100), (1, 0, 50), (13, 55, 40), (1000, 0, 30), (10, 100, 250)]
    {
        let (_temp, dir) = scratch();
        let options = PostHocEma::options(&dir).sigma_rels([0.05, 0.28]).betas([0.98]).half_lives([40.0]);
        let options = options.update_every(every).update_after_step(after).checkpoint_every(checkpoint);
        let mut walk = Walk::new(every);
        let mut ema = options.create(&walk.model).unwrap();
        let trajectory = train(&mut ema, &mut walk, 500);
        let schedule = Schedule {
            update_every: every,
            update_after_step: after,
            checkpoint_every: checkpoint,
            ..Schedule::default()
        };
        let expected = schedule.updates(500).unwrap().times();
        assert_eq!(trajectory.iter().map(|(t, _)| *t).collect::<Vec<_>>(), expected);
        let last = *expected.last().unwrap();
        for (index, profile) in ema.profiles().to_vec().iter().enumerate() {
            let exact = direct(&trajectory, profile, last);
            let layout = ema.registry.layout();
            let high = &averages(&ema)[index].high;
            let got: Vec<f64> = (0..3).flat_map(|i| high[layout.range(i)].iter().map(|&x| f64::from(x))).collect();
            // Half an ulp of f32 near 1, and as much for the rounded weights.
            assert!(largest_difference(&got, &exact) < 1.2e-7, "{profile} every {every}");
        }
    }
}

/// Checks that a synthesis differs from the exact average by no more than the predicted profile error allows.
///
/// The bound is Cauchy-Schwarz with the trajectory's norm over the update intervals, plus rounding.
#[test]
fn synthesis_is_within_the_predicted_error() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(11);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).max_checkpoints(100).create(&walk.model).unwrap();
    let trajectory = train(&mut ema, &mut walk, 2000);
    let run = Run::open(&dir).unwrap();
    let mut profiles: Vec<Profile> =
        [0.05, 0.06, 0.1, 0.15, 0.25, 0.28].map(|s| Profile::sigma_rel(s).unwrap()).to_vec();
    profiles.push(Profile::uniform(Window::Fraction(0.3)).unwrap());
    profiles.push(Profile::linear(Window::Steps(900.0)).unwrap());
    profiles.push(Profile::beta(0.995).unwrap());
    for at in [2000, 1450, 1437] {
        for profile in &profiles {
            let plan = run.plan(profile.clone(), At::Step(at)).unwrap();
            let got = floats(&run.load(&plan).unwrap());
            let exact = direct(&trajectory, profile, at);
            let updates: Vec<_> = trajectory.iter().filter(|(t, _)| *t <= at).collect();
            let norm = target_norm(&updates, profile, at);
            for (i, (got, exact)) in got.iter().zip(&exact).enumerate() {
                // The weights of blend and target both sum to 1, so a constant may be subtracted from the trajectory.
                let centre = updates.iter().map(|(_, v)| v[i]).sum::<f64>() / updates.len() as f64;
                let moved: f64 = updates.iter().map(|(_, v)| (v[i] - centre).powi(2) * 10.0).sum::<f64>().sqrt();
                let allowed = plan.relative_error * norm * moved + 2.4e-7 * (1.0 + plan.noise_gain);
                assert!((got - exact).abs() <= allowed, "{profile} at {at}: {got} {exact} allowed {allowed}");
            }
        }
    }
}

/// Returns `||r||` of a target over the updates.
fn target_norm(updates: &[&(u64, Vec<f64>)], profile: &Profile, at: u64) -> f64 {
    let mut square = 0.0;
    let mut share = 0.0;
    let mut time = 0;
    for (t, _) in updates {
        let next = if *t == updates.last().unwrap().0 { 1.0 } else { profile.cumulative(*t as f64, at as f64) };
        square += (next - share).powi(2) / (t - time) as f64;
        (share, time) = (next, *t);
    }
    square.sqrt()
}

#[test]
fn stored_profile_and_constant_are_reproduced_exactly() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(2);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 1000);
    ema.finish().unwrap();
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::sigma_rel(0.05).unwrap(), At::Latest).unwrap();
    assert!(plan.relative_error < 1e-11 && (plan.noise_gain - 1.0).abs() < 1e-9);
    let stored = run.snapshots().iter().find(|s| s.id.index == 0 && s.id.step == 1000).unwrap();
    for (name, tensor) in run.load(&plan).unwrap().iter() {
        assert_eq!(tensor.bytes, *stored.tensor(name).unwrap().1, "{name}");
    }

    let (_temp, dir) = scratch();
    let constant = vec![("w", vec![0.1f32, -3.7e-5, 65000.0, 0.0])];
    let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&constant).unwrap();
    for _ in 0..2000 {
        ema.update(&constant).unwrap();
    }
    let run = Run::open(&dir).unwrap();
    for sigma_rel in [0.01, 0.03, 0.07, 0.15, 0.288] {
        let plan = run.plan(Profile::sigma_rel(sigma_rel).unwrap(), At::Latest).unwrap();
        assert_eq!(run.load(&plan).unwrap().get("w").unwrap().to_vec::<f32>().unwrap(), constant[0].1, "{sigma_rel}");
    }
}

#[test]
fn one_pass_equals_many_passes_for_any_number_of_threads() {
    let (temp, dir) = scratch();
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(4);
    let mut model = vec![("large", vec![0f32; 300_001]), ("small", vec![0f32; 3]), ("tiny", vec![0f32; 1])];
    let mut ema = PostHocEma::options(&dir)
        .update_every(1)
        .checkpoint_every(2)
        .checkpoint_dtype(Dtype::F16)
        .create(&model)
        .unwrap();
    for _ in 0..8 {
        model.iter_mut().flat_map(|(_, v)| v).for_each(|v| *v += random.random::<f32>() - 0.5);
        ema.update(&model).unwrap();
    }
    let run = Run::open(&dir).unwrap();
    let profiles: Vec<Profile> = (0..9).map(|i| Profile::sigma_rel(0.05 + 0.025 * f64::from(i)).unwrap()).collect();
    let plans = run.plans(&profiles, At::Latest).unwrap();
    let write = |threads: usize, name: &str, dtype| -> Vec<Vec<u8>> {
        let paths: Vec<PathBuf> = (0..plans.len()).map(|i| temp.path().join(format!("{name}{i}"))).collect();
        let outputs: Vec<Output<'_>> = plans.iter().zip(&paths).map(|(plan, path)| Output { plan, path }).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run.write_all(&outputs, &WriteOptions { dtype, ..WriteOptions::default() })).unwrap();
        paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
    };
    for dtype in [None, Some(Dtype::BF16)] {
        let together = write(1, "one", dtype);
        assert_eq!(write(5, "five", dtype), together);
        for (i, plan) in plans.iter().enumerate() {
            let path = temp.path().join("alone");
            run.write_all(&[Output { plan, path: &path }], &WriteOptions { dtype, ..WriteOptions::default() }).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), together[i]);
            if dtype.is_none() {
                let file = std::fs::read(&path).unwrap();
                let file = safetensors::SafeTensors::deserialize(&file).unwrap();
                for (name, tensor) in run.load(plan).unwrap().iter() {
                    assert_eq!(file.tensor(name).unwrap().data(), tensor.bytes);
                }
            }
        }
    }
}

#[test]
fn synthesis_during_training_reaches_the_newest_update() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(8);
    let options = PostHocEma::options(&dir).checkpoint_every(100).snapshot_growth(None);
    let mut ema = options.create(&walk.model).unwrap();
    let profile = Profile::sigma_rel(0.1).unwrap();
    assert!(ema.synthesize(profile.clone()).unwrap_err().to_string().contains("no update yet"));
    let mut trajectory = train(&mut ema, &mut walk, 30);
    // Before the first snapshot, the live averages are the only sources.
    assert_eq!(ema.plan(profile.clone()).unwrap().weights.len(), 2);
    trajectory.extend(train(&mut ema, &mut walk, 955));
    let plan = ema.plan(profile.clone()).unwrap();
    assert_eq!((plan.at, plan.weights.len()), (980, 2 * 9 + 2));
    let got = floats(&ema.synthesize(profile.clone()).unwrap());
    assert!(largest_difference(&got, &direct(&trajectory, &profile, 980)) < 2e-3);
    // The live average replaces a snapshot of the same step.
    trajectory.extend(train(&mut ema, &mut walk, 15));
    assert_eq!(ema.plan(profile).unwrap().weights.len(), 2 * 9 + 2);
}

#[test]
fn switch_to_writes_the_average_into_the_model() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(9);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 250);
    let profile = Profile::sigma_rel(0.12).unwrap();
    let expected = ema.synthesize(profile.clone()).unwrap();
    let mut model = walk.model.clone();
    ema.switch_to(profile.clone(), &mut model).unwrap();
    for (name, values) in &model {
        assert_eq!(expected.get(name).unwrap().to_vec::<f32>().as_ref(), Some(values));
    }
    // A model with other tensors is refused and unchanged.
    let mut other: Model = vec![("a.weight", vec![1.0; 37]), ("b.weight", vec![2.0; 6]), ("c.bias", vec![3.0])];
    let before = other.clone();
    let text = ema.switch_to(profile.clone(), &mut other).unwrap_err().to_string();
    assert!(text.contains("b.weight") && text.contains("[6]"), "{text}");
    assert_eq!(other, before);
    let mut fewer = walk.model[..2].to_vec();
    assert!(ema.switch_to(profile, &mut fewer).unwrap_err().to_string().contains("c.bias"));
}

#[test]
fn updates_on_a_clock_of_images_are_exact() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(6);
    let options = PostHocEma::options(&dir).update_every(1000).checkpoint_every(10_000);
    let mut ema = options.create(&walk.model).unwrap();
    let mut trajectory = Vec::new();
    for batch in 1..=300u64 {
        let time = batch * 128 + batch % 3;
        if ema.update_at(time, walk.step()).unwrap() != UpdateOutcome::Skipped {
            trajectory.push((time, Walk::values(&walk.model)));
        }
    }
    let last = ema.history().last().unwrap();
    assert_eq!(ema.history().times(), trajectory.iter().map(|(t, _)| *t).collect::<Vec<_>>());
    let weights = Chain::Tracked(ema.profiles()[1].clone()).weights(&ema.history().times());
    assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-14);
    let exact = direct(&trajectory, &ema.profiles()[1].clone(), last);
    let got = floats(&ema.synthesize(ema.profiles()[1].clone()).unwrap());
    assert!(largest_difference(&got, &exact) < 2.4e-7);
    let text = ema.update_at(5, &walk.model).unwrap_err().to_string();
    assert!(text.contains("time 5") && text.contains("times must increase"), "{text}");
}
