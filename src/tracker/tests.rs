//! The tracker by identities and against naive oracles.

use std::cell::Cell;
use std::path::PathBuf;

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use safetensors::Dtype;
use tempfile::TempDir;

use super::*;
use crate::compute::cpu::Precision;
use crate::math::{Chain, Schedule, Window};
use crate::synthesis::{At, Output, Run, WriteOptions};
use crate::tensor::{Tensor, Tensors};

/// A directory for a run that does not exist yet.
fn scratch() -> (TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    (temp, dir)
}

type Model = Vec<(&'static str, Vec<f32>)>;

const SIZES: [(&str, usize); 3] = [("a.weight", 37), ("b.weight", 5), ("c.bias", 1)];

/// A random walk with drift: what parameters do.
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

fn floats(tensors: &Tensors) -> Vec<f64> {
    let values = tensors.iter().filter_map(|(_, tensor)| tensor.to_vec::<f32>());
    values.flatten().map(f64::from).collect()
}

/// `sum_k w_k p_k`, straight from the definition of a profile.
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

/// Trains for some steps and returns the trajectory of the updates.
fn train(ema: &mut PostHocEma, walk: &mut Walk, steps: u64) -> Vec<(u64, Vec<f64>)> {
    let mut trajectory = Vec::new();
    for _ in 0..steps {
        let step = ema.update(walk.step()).unwrap();
        if step != Step::Skipped {
            trajectory.push((ema.step(), Walk::values(&walk.model)));
        }
    }
    trajectory
}

#[test]
fn the_running_average_is_the_direct_sum_for_every_schedule() {
    for (every, after, checkpoint) in
        [(10, 0, 100), (7, 0, 100), (1, 0, 50), (13, 55, 40), (1000, 0, 30), (10, 100, 250)]
    {
        let (_temp, dir) = scratch();
        let options = PostHocEma::options(&dir).sigma_rels([0.05, 0.28]).betas([0.98]).half_lives([40.0]);
        let options = options.update_every(every).update_after_step(after).checkpoint_every(checkpoint);
        let mut walk = Walk::new(every);
        let mut ema = options.create(&walk.model).unwrap();
        let trajectory = train(&mut ema, &mut walk, 500);
        let schedule = Schedule { update_every: every, update_after_step: after, checkpoint_every: checkpoint };
        let expected = schedule.updates(500).unwrap().times();
        assert_eq!(trajectory.iter().map(|(t, _)| *t).collect::<Vec<_>>(), expected);
        let last = *expected.last().unwrap();
        for (index, profile) in ema.profiles().to_vec().iter().enumerate() {
            let exact = direct(&trajectory, profile, last);
            let layout = ema.table.layout();
            let high = &ema.averages[index].high;
            let got: Vec<f64> = (0..3).flat_map(|i| high[layout.place(i)].iter().map(|&x| f64::from(x))).collect();
            // Half an ulp of f32 near 1, and as much again for the rounded weights.
            assert!(largest_difference(&got, &exact) < 1.2e-7, "{profile} every {every}");
        }
    }
}

#[test]
fn stopping_and_resuming_gives_the_same_bits() {
    let targets = [0.03, 0.1, 0.2].map(|s| Profile::sigma_rel(s).unwrap());
    let straight = {
        let (_temp, dir) = scratch();
        let mut walk = Walk::new(5);
        let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&walk.model).unwrap();
        train(&mut ema, &mut walk, 1000);
        (ema.averages.clone(), targets.clone().map(|p| ema.synthesize(p).unwrap()), snapshot_bytes(&dir))
    };
    // In the middle of an interval, at an update, at a snapshot.
    for stop in [503, 510, 500] {
        let (_temp, dir) = scratch();
        let mut walk = Walk::new(5);
        let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&walk.model).unwrap();
        train(&mut ema, &mut walk, stop);
        ema.save().unwrap();
        drop(ema);
        let mut ema = PostHocEma::options(&dir).resume(&walk.model).unwrap();
        assert_eq!(ema.step(), stop);
        train(&mut ema, &mut walk, 1000 - stop);
        for (a, b) in ema.averages.iter().zip(&straight.0) {
            assert_eq!((&a.high, &a.low), (&b.high, &b.low));
        }
        assert_eq!(targets.clone().map(|p| ema.synthesize(p).unwrap()), straight.1);
        assert_eq!(snapshot_bytes(&dir), straight.2);
    }
}

/// The data of every snapshot of a run.
fn snapshot_bytes(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let run = Run::open(dir).unwrap();
    let tensors = run.snapshots().iter().flat_map(|snapshot| {
        snapshot
            .tensors()
            .map(|(name, _)| (format!("{} {name}", snapshot.stem), snapshot.tensor(name).unwrap().1.to_vec()))
    });
    tensors.collect()
}

/// The promise of the whole tool: what is synthesized differs from the exact average by no more than the predicted
/// profile error allows (Cauchy-Schwarz with the trajectory's norm over the update intervals), plus rounding.
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
                // The weights of blend and target both sum to 1, so a constant may be taken off the trajectory.
                let centre = updates.iter().map(|(_, v)| v[i]).sum::<f64>() / updates.len() as f64;
                let moved: f64 = updates.iter().map(|(_, v)| (v[i] - centre).powi(2) * 10.0).sum::<f64>().sqrt();
                let allowed = plan.relative_error * norm * moved + 2.4e-7 * (1.0 + plan.noise_gain);
                assert!((got - exact).abs() <= allowed, "{profile} at {at}: {got} {exact} allowed {allowed}");
            }
        }
    }
}

/// `||r||` of a target over the updates.
fn target_norm(updates: &[&(u64, Vec<f64>)], profile: &Profile, at: u64) -> f64 {
    let (mut square, mut share, mut time) = (0.0, 0.0, 0);
    for (t, _) in updates {
        let next = if *t == updates.last().unwrap().0 { 1.0 } else { profile.cumulative(*t as f64, at as f64) };
        square += (next - share).powi(2) / (t - time) as f64;
        (share, time) = (next, *t);
    }
    square.sqrt()
}

#[test]
fn a_stored_profile_comes_back_and_a_constant_too() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(2);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 1000);
    ema.finish().unwrap();
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::sigma_rel(0.05).unwrap(), At::Latest).unwrap();
    assert!(plan.relative_error < 1e-11 && (plan.noise_gain - 1.0).abs() < 1e-9);
    let stored = run.snapshots().iter().find(|s| s.stem.index == 0 && s.stem.step == 1000).unwrap();
    for (name, tensor) in run.load(&plan).unwrap().iter() {
        assert_eq!(tensor.bytes, stored.tensor(name).unwrap().1, "{name}");
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
fn many_targets_in_one_pass_equal_many_passes_for_any_number_of_threads() {
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
        pool.install(|| run.write_all(&outputs, &WriteOptions { dtype, progress: None })).unwrap();
        paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
    };
    for dtype in [None, Some(Dtype::BF16)] {
        let together = write(1, "one", dtype);
        assert_eq!(write(5, "five", dtype), together);
        for (i, plan) in plans.iter().enumerate() {
            let path = temp.path().join("alone");
            run.write_all(&[Output { plan, path: &path }], &WriteOptions { dtype, progress: None }).unwrap();
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
    let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&walk.model).unwrap();
    let profile = Profile::sigma_rel(0.1).unwrap();
    assert!(ema.synthesize(profile.clone()).unwrap_err().to_string().contains("no update yet"));
    let mut trajectory = train(&mut ema, &mut walk, 30);
    // Before the first snapshot the live averages are all there is.
    assert_eq!(ema.plan(profile.clone()).unwrap().weights.len(), 2);
    trajectory.extend(train(&mut ema, &mut walk, 955));
    let plan = ema.plan(profile.clone()).unwrap();
    assert_eq!((plan.at, plan.weights.len()), (980, 2 * 9 + 2));
    let got = floats(&ema.synthesize(profile.clone()).unwrap());
    assert!(largest_difference(&got, &direct(&trajectory, &profile, 980)) < 2e-3);
    // Where there is a snapshot of the same step, the live average stands for it.
    trajectory.extend(train(&mut ema, &mut walk, 15));
    assert_eq!(ema.plan(profile).unwrap().weights.len(), 2 * 9 + 2);
}

#[test]
fn switching_makes_the_model_its_average_in_place() {
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
    // A model with other tensors is refused and left as it is.
    let mut other: Model = vec![("a.weight", vec![1.0; 37]), ("b.weight", vec![2.0; 6]), ("c.bias", vec![3.0])];
    let before = other.clone();
    let text = ema.switch_to(profile.clone(), &mut other).unwrap_err().to_string();
    assert!(text.contains("b.weight") && text.contains("[6]"), "{text}");
    assert_eq!(other, before);
    let mut fewer = walk.model[..2].to_vec();
    assert!(ema.switch_to(profile, &mut fewer).unwrap_err().to_string().contains("c.bias"));
}

/// A model of every kind of tensor.
fn mixed(step: u16) -> Tensors {
    let value = f32::from(step);
    let tensor = |shape: &[usize], values: &[f32]| Tensor::new(shape, values).unwrap();
    let mut model = Tensors::default();
    model.insert("bf16", Tensor::new(&[2, 2], &[bf16::from_f32(value); 4]).unwrap());
    model.insert("f16", Tensor::new(&[3], &[f16::from_f32(value); 3]).unwrap());
    model.insert("f32", tensor(&[1, 1, 5], &[value; 5]));
    model.insert("f64", Tensor::new(&[], &[f64::from(value)]).unwrap());
    model.insert("empty", tensor(&[0, 4], &[]));
    model.insert("steps", Tensor::new(&[2], &[i64::from(step), -1]).unwrap());
    model.insert("mask", Tensor { dtype: Dtype::BOOL, shape: vec![3], bytes: vec![1, 0, 1] });
    model.insert("norm.running_var", tensor(&[2], &[value, 2.0 * value]));
    model.insert("frozen.weight", tensor(&[2], &[7.0, 8.0]));
    model
}

#[test]
fn every_dtype_is_averaged_copied_or_left_out_and_comes_back_as_it_was() {
    let (temp, dir) = scratch();
    let options = || PostHocEma::options(&dir).checkpoint_every(10).copy(["*.running_*"]).leave_out(["frozen.*"]);
    let mut ema = options().update_every(1).create(&mixed(0)).unwrap();
    for step in 1..=20 {
        ema.update(&mixed(step)).unwrap();
    }
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap();
    let average = run.load(&plan).unwrap();
    assert_eq!(average.len(), 8);
    assert_eq!(average.get("steps").unwrap(), mixed(20).get("steps").unwrap());
    assert_eq!(average.get("mask").unwrap(), mixed(20).get("mask").unwrap());
    assert_eq!(average.get("norm.running_var").unwrap(), mixed(20).get("norm.running_var").unwrap());
    // 20 updates of two profiles determine the plain mean to a few percent.
    let mean = average.get("f64").unwrap().to_vec::<f64>().unwrap()[0];
    assert!((mean - 10.5).abs() < 0.5, "{mean}");
    for (name, tensor) in average.iter() {
        let original = mixed(0).get(name).unwrap().clone();
        assert_eq!((tensor.dtype, &tensor.shape), (original.dtype, &original.shape));
    }
    let path = temp.path().join("out");
    run.write_all(&[Output { plan: &plan, path: &path }], &WriteOptions { dtype: Some(Dtype::F32), progress: None })
        .unwrap();
    let file = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(file.tensor("bf16").unwrap().dtype(), Dtype::F32);
    assert_eq!(file.tensor("steps").unwrap().dtype(), Dtype::I64);
    // A resume knows the copies too, and insists on them.
    ema.save().unwrap();
    drop(ema);
    let fewer: Tensors = mixed(3).into_iter().filter(|(name, _)| name != "steps").collect();
    assert!(options().resume(&fewer).unwrap_err().to_string().contains("`steps`: it is no longer there to be copied"));
    let mut more = mixed(3);
    more.insert("new", Tensor::new(&[1], &[1i64]).unwrap());
    assert!(options().resume(&more).unwrap_err().to_string().contains("`new`: it was not there when the run began"));
    let ema = options().resume(&mixed(3)).unwrap();
    assert_eq!(ema.synthesize(Profile::gamma(0.0).unwrap()).unwrap().get("steps"), mixed(20).get("steps"));
}

#[test]
fn dtypes_that_need_a_decision_are_named() {
    for dtype in [Dtype::F8_E4M3, Dtype::C64] {
        let size = dtype.bitsize() / 8;
        let mut model = mixed(0);
        model.insert("odd", Tensor { dtype, shape: vec![2], bytes: vec![0; 2 * size] });
        let (_temp, dir) = scratch();
        let text = PostHocEma::options(&dir).create(&model).unwrap_err().to_string();
        assert!(text.contains("`odd`") && text.contains("to copy or to leave out"), "{text}");
        assert!(!dir.exists());
        PostHocEma::options(&dir).copy(["odd"]).create(&model).unwrap();
    }
}

/// A model of which two tensors are one.
struct Tied {
    values: Vec<f32>,
    apart: Cell<bool>,
}

impl Parameters for Tied {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let copy = self.values.clone();
        let second = if self.apart.get() { &copy } else { &self.values };
        [("head", self.values.as_slice()), ("embedding", second.as_slice())].with_tensors(read)
    }
}

#[test]
fn tied_tensors_are_stored_once() {
    let (_temp, dir) = scratch();
    let model = Tied { values: vec![1.5; 10], apart: Cell::new(false) };
    let mut ema = PostHocEma::options(&dir).update_every(1).checkpoint_every(1).create(&model).unwrap();
    ema.update(&model).unwrap();
    ema.update(&model).unwrap();
    let run = Run::open(&dir).unwrap();
    assert_eq!(run.snapshots()[0].tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["embedding"]);
    assert_eq!(run.snapshots()[0].files()[0].metadata()["head"], "embedding");
    let average = run.load(&run.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap()).unwrap();
    assert_eq!(average.get("head"), average.get("embedding"));
    assert_eq!(average.len(), 2);
    model.apart.set(true);
    let text = ema.update(&model).unwrap_err().to_string();
    assert!(text.contains("`head`") && text.contains("no longer"), "{text}");
}

#[test]
fn values_beyond_f16_are_kept_in_f32() {
    let (_temp, dir) = scratch();
    let model = vec![("large", vec![65_520.0f32, 1.0]), ("fine", vec![65_519.0f32])];
    let options = PostHocEma::options(&dir).update_every(1).checkpoint_every(1).checkpoint_dtype(Dtype::F16);
    options.create(&model).unwrap().update(&model).unwrap();
    let run = Run::open(&dir).unwrap();
    let snapshot = &run.snapshots()[0];
    assert_eq!(snapshot.tensor("large").unwrap().0.dtype, Dtype::F32);
    assert_eq!(snapshot.tensor("fine").unwrap().0.dtype, Dtype::F16);
    assert_eq!(snapshot.model_dtype("fine", Dtype::F16), Dtype::F32);
    let average = run.load(&run.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap()).unwrap();
    assert_eq!(average.get("large").unwrap().to_vec::<f32>().unwrap(), [65_520.0, 1.0]);
    assert_eq!(average.get("fine").unwrap().to_vec::<f32>().unwrap(), [65_504.0]);
}

#[test]
fn values_that_are_not_finite_are_named_and_nothing_is_written() {
    for bad in [f32::NAN, f32::INFINITY] {
        let (_temp, dir) = scratch();
        let mut model = vec![("w", vec![1.0f32; 9])];
        let mut ema = PostHocEma::options(&dir).update_every(1).checkpoint_every(2).create(&model).unwrap();
        ema.update(&model).unwrap();
        ema.update(&model).unwrap();
        let before = listing(&dir);
        model[0].1[4] = bad;
        ema.update(&model).unwrap();
        let text = ema.update(&model).unwrap_err().to_string();
        for part in ["`w`", "element 4", "step 4", "sigma_rel 0.05"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(listing(&dir), before);
        drop(ema);
        assert_eq!(PostHocEma::options(&dir).resume(&model).unwrap().step(), 2);
    }
}

/// Every file of a run with its contents.
fn listing(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn only_the_newest_snapshots_are_kept() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let options = PostHocEma::options(&dir).checkpoint_every(20).max_checkpoints(3).shard_size(100);
    let mut ema = options.create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 130);
    let run = Run::open(&dir).unwrap();
    let stems: Vec<String> = run.snapshots().iter().map(|snapshot| snapshot.stem.to_string()).collect();
    assert_eq!(stems, ["0.80", "0.100", "0.120", "1.80", "1.100", "1.120"]);
    assert_eq!(run.snapshots()[0].files().len(), 2);
    // finish() stores what the last snapshot does not hold.
    ema.finish().unwrap();
    let run = Run::open(&dir).unwrap();
    assert_eq!(run.snapshots().last().unwrap().stem.to_string(), "1.130");
    assert_eq!(run.snapshots().len(), 6);
}

#[test]
fn an_interrupted_checkpoint_is_completed_on_resume() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 100);
    drop(ema);
    let whole = listing(&dir);
    std::fs::remove_file(dir.join("1.100.safetensors")).unwrap();
    std::fs::write(dir.join(".posthoc-ema-left-behind"), "x").unwrap();
    drop(PostHocEma::options(&dir).resume(&walk.model).unwrap());
    assert_eq!(listing(&dir), whole);
}

#[test]
fn a_checkpoint_that_could_not_be_written_is_made_up_for() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 99);
    let aside = dir.with_extension("aside");
    let stems = || Run::open(&dir).unwrap().snapshots().iter().map(|s| s.stem.to_string()).collect::<Vec<_>>();
    std::fs::rename(&dir, &aside).unwrap();
    let text = ema.update(walk.step()).unwrap_err().to_string();
    assert!(text.contains("state.safetensors") && text.contains("check the path"), "{text}");
    // finish() can be called again when there is room again.
    assert!(ema.finish().is_err());
    std::fs::rename(&aside, &dir).unwrap();
    // So does the next update.
    train(&mut ema, &mut walk, 10);
    assert_eq!(stems(), ["0.50", "0.100", "1.50", "1.100"]);
    ema.finish().unwrap();
    assert_eq!(stems(), ["0.50", "0.100", "0.110", "1.50", "1.100", "1.110"]);
    // What is stored afterwards is what an undisturbed run stores.
    let (_temp, straight) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = PostHocEma::options(&straight).checkpoint_every(50).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 110);
    ema.finish().unwrap();
    assert_eq!(snapshot_bytes(&dir), snapshot_bytes(&straight));
}

/// The disk fills between the state and the last snapshot, and the training saves its own checkpoint before it dies.
#[test]
fn a_checkpoint_cut_short_is_completed_after_a_save_too() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 49);
    // What stands in the way of the second profile's file alone.
    let obstacle = dir.join("1.50.safetensors");
    std::fs::create_dir(&obstacle).unwrap();
    let text = ema.update(walk.step()).unwrap_err().to_string();
    assert!(text.contains("1.50.safetensors"), "{text}");
    ema.save().unwrap();
    drop(ema);
    std::fs::remove_dir(&obstacle).unwrap();
    drop(PostHocEma::options(&dir).resume(&walk.model).unwrap());
    let run = Run::open(&dir).unwrap();
    assert_eq!(run.snapshots().iter().map(|s| s.stem.to_string()).collect::<Vec<_>>(), ["0.50", "1.50"]);
}

#[test]
fn an_index_of_shards_that_is_missing_is_written_on_resume() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).shard_size(100).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 50);
    drop(ema);
    let whole = listing(&dir);
    std::fs::remove_file(dir.join("1.50.safetensors.index.json")).unwrap();
    drop(PostHocEma::options(&dir).resume(&walk.model).unwrap());
    assert_eq!(listing(&dir), whole);
}

#[test]
fn any_name_of_a_tied_tensor_stands_for_it() {
    let model = Tied { values: vec![1.5; 10], apart: Cell::new(false) };
    let (_temp, dir) = scratch();
    let options = PostHocEma::options(&dir).average(["head"]).update_every(1).checkpoint_every(1);
    options.create(&model).unwrap().update(&model).unwrap();
    assert!(Run::open(&dir).unwrap().snapshots()[0].meta.copied.is_empty());
    let (_temp, dir) = scratch();
    let text = PostHocEma::options(&dir).copy(["head"]).create(&model).unwrap_err().to_string();
    assert!(text.contains("no floating-point tensor to average"), "{text}");
}

#[test]
fn a_poisoned_average_does_not_replace_a_sound_state() {
    let (_temp, dir) = scratch();
    let mut model = vec![("w", vec![1.0f32; 9])];
    let mut ema = PostHocEma::options(&dir).update_every(1).checkpoint_every(2).create(&model).unwrap();
    ema.update(&model).unwrap();
    ema.update(&model).unwrap();
    let before = listing(&dir);
    model[0].1[4] = f32::NAN;
    ema.update(&model).unwrap();
    assert!(matches!(ema.save(), Err(Error::NonFinite { element: 4, .. })));
    assert!(matches!(ema.finish(), Err(Error::NonFinite { .. })));
    assert_eq!(listing(&dir), before);
}

#[test]
fn a_resume_may_change_the_schedule_and_stays_exact() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(12);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).create(&walk.model).unwrap();
    let mut trajectory = train(&mut ema, &mut walk, 205);
    ema.save().unwrap();
    drop(ema);
    let options = PostHocEma::options(&dir).update_every(3).checkpoint_every(70).max_checkpoints(2);
    let mut ema = options.checkpoint_dtype(Dtype::F16).shard_size(50).resume_or_create(&walk.model).unwrap();
    trajectory.extend(train(&mut ema, &mut walk, 150));
    let run = Run::open(&dir).unwrap();
    let stems: Vec<String> = run.snapshots().iter().map(|s| s.stem.to_string()).collect();
    assert_eq!(stems, ["0.280", "0.350", "1.280", "1.350"]);
    assert_eq!(run.snapshots()[0].files().len(), 2);
    assert_eq!(ema.history().times(), trajectory.iter().map(|(t, _)| *t).collect::<Vec<_>>());
    let profile = Profile::sigma_rel(0.28).unwrap();
    let got = floats(&ema.synthesize(profile.clone()).unwrap());
    assert!(largest_difference(&got, &direct(&trajectory, &profile, 354)) < 2.4e-7);
}

#[test]
fn names_choose_what_is_averaged() {
    let (_temp, dir) = scratch();
    let model =
        |v: f32| vec![("layers[0].lora_a", vec![v]), ("layers[0].weight", vec![v]), ("layers[1].lora_a", vec![v])];
    let options = || PostHocEma::options(&dir).update_every(1).checkpoint_every(2);
    for (options, part) in [
        (options().copy(["*.loar_*"]), "`*.loar_*` stands for no tensor"),
        (options().average(["nothing"]), "`nothing` stands for no tensor"),
        (options().leave_out(["layers[2].weight"]), "stands for no tensor"),
    ] {
        let text = options.create(&model(0.0)).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    // What is named to be averaged has to be a dtype that can be; what is not named is copied, whatever its dtype.
    let mut odd = mixed(0);
    odd.insert("base", Tensor { dtype: Dtype::F8_E4M3, shape: vec![2], bytes: vec![0; 2] });
    let text = options().average(["f32", "steps"]).create(&odd).unwrap_err().to_string();
    assert!(text.contains("`steps`: I64 cannot be averaged"), "{text}");
    let (_elsewhere, elsewhere) = scratch();
    PostHocEma::options(&elsewhere).average(["f32"]).create(&odd).unwrap();
    // A name with brackets is a glob too, but stands for itself.
    let mut ema = options().average(["*.lora_*"]).leave_out(["layers[1].lora_a"]).create(&model(0.0)).unwrap();
    ema.update(&model(1.0)).unwrap();
    ema.update(&model(2.0)).unwrap();
    let average = ema.synthesize(Profile::gamma(0.0).unwrap()).unwrap();
    let value = |name: &str| average.get(name).map(|tensor| tensor.to_vec::<f32>().unwrap()[0]);
    assert_eq!(value("layers[0].weight"), Some(2.0));
    assert!(value("layers[0].lora_a").unwrap() < 2.0);
    assert_eq!(value("layers[1].lora_a"), None);
}

#[test]
fn views_that_lie_about_their_size_are_refused() {
    struct Lying(usize);
    impl Parameters for Lying {
        fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
            let bytes = [0u8; 64];
            let memory = crate::tensor::Memory::Host(&bytes[..self.0]);
            read(&[TensorView { name: "w", dtype: Dtype::F32, shape: &[4], memory }])
        }
    }
    let (_temp, dir) = scratch();
    assert!(PostHocEma::options(&dir).create(&Lying(20)).unwrap_err().to_string().contains("20 bytes were lent"));
    let mut ema = PostHocEma::options(&dir).update_every(1).create(&Lying(16)).unwrap();
    assert!(ema.update(&Lying(12)).unwrap_err().to_string().contains("12 bytes were lent"));
    // A call that was refused did not happen.
    assert_eq!(ema.step(), 0);
    assert_eq!(ema.update(&Lying(16)).unwrap(), Step::Updated);
}

#[test]
fn a_clock_of_images_may_jump() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(6);
    let options = PostHocEma::options(&dir).update_every(1000).checkpoint_every(10_000);
    let mut ema = options.create(&walk.model).unwrap();
    let mut trajectory = Vec::new();
    for batch in 1..=300u64 {
        let time = batch * 128 + batch % 3;
        if ema.update_at(time, walk.step()).unwrap() != Step::Skipped {
            trajectory.push((time, Walk::values(&walk.model)));
        }
    }
    let last = ema.history().last().unwrap();
    assert_eq!(ema.history().times(), trajectory.iter().map(|(t, _)| *t).collect::<Vec<_>>());
    let weights = Chain::Tracked(ema.profiles()[1].clone()).densities(&ema.history().times());
    assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-14);
    let exact = direct(&trajectory, &ema.profiles()[1].clone(), last);
    let got = floats(&ema.synthesize(ema.profiles()[1].clone()).unwrap());
    assert!(largest_difference(&got, &exact) < 2.4e-7);
    let text = ema.update_at(5, &walk.model).unwrap_err().to_string();
    assert!(text.contains("time 5") && text.contains("must grow"), "{text}");
}

#[test]
fn changed_parameters_are_named_and_the_run_goes_on() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(7);
    let mut ema = PostHocEma::options(&dir).update_every(1).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 3);
    let before = ema.averages[0].high.clone();
    let base = walk.model.clone();
    let renamed: Model = base.iter().map(|(n, v)| (if *n == "c.bias" { "d.bias" } else { n }, v.clone())).collect();
    let grown: Model = base.iter().map(|(n, v)| (*n, [v.clone(), vec![0.0]].concat())).collect();
    let doubles: Vec<(&str, Vec<f64>)> =
        base.iter().map(|(n, v)| (*n, v.iter().map(|&x| x.into()).collect())).collect();
    let twice: Model = [base.clone(), base[..1].to_vec()].concat();
    for (error, part) in [
        (ema.update(&renamed).unwrap_err(), "`d.bias`: it was not there"),
        (ema.update(&base[..2].to_vec()).unwrap_err(), "`c.bias`: it is no longer there"),
        (ema.update(&grown).unwrap_err(), "`a.weight`: its shape is [38], it was [37]"),
        (ema.update(&doubles).unwrap_err(), "`a.weight`: its dtype is F64, it was F32"),
        (ema.update(&twice).unwrap_err(), "occurs twice"),
    ] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(ema.averages[0].high, before);
    // Another order of the same tensors is the same model.
    let reversed: Model = base.iter().rev().cloned().collect();
    assert_eq!(ema.update(&reversed).unwrap(), Step::Updated);
}

#[test]
fn runs_are_not_overwritten_shared_or_mixed() {
    let (temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let text = |result: Result<PostHocEma>| result.unwrap_err().to_string();
    assert!(text(PostHocEma::options(&dir).resume(&walk.model)).contains("no run here (no state.safetensors"));
    let part = temp.path().join("part");
    std::fs::create_dir(&part).unwrap();
    std::fs::write(part.join("0.20-00001-of-00002.safetensors"), "still being copied in").unwrap();
    assert!(text(PostHocEma::options(&part).create(&walk.model)).contains("already holds a run (0.20-00001"));
    assert!(text(PostHocEma::options(&part).resume_or_create(&walk.model)).contains("already holds a run"));
    assert!(text(PostHocEma::options(&part).resume(&walk.model)).contains("snapshots but no state.safetensors"));
    assert_eq!(std::fs::read_dir(&part).unwrap().count(), 1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(20).create(&walk.model).unwrap();
    assert!(text(PostHocEma::options(&dir).create(&walk.model)).contains("another tracker is writing"));
    train(&mut ema, &mut walk, 40);
    assert!(text(PostHocEma::options(&dir).resume(&walk.model)).contains("another tracker is writing"));
    drop(ema);
    let whole = listing(&dir);
    assert!(text(PostHocEma::options(&dir).create(&walk.model)).contains("already holds a run"));
    let other = PostHocEma::options(&dir).sigma_rels([0.1]);
    assert!(text(other.resume(&walk.model)).contains("the run has sigma_rel 0.05, sigma_rel 0.28"));
    let plain = PostHocEma::options(&dir).precision(Precision::Plain);
    assert!(text(plain.resume(&walk.model)).contains("precision"));
    assert!(text(PostHocEma::options(&dir).resume(&walk.model[..2].to_vec())).contains("c.bias"));
    assert_eq!(listing(&dir), whole);

    // A snapshot of a run with the same options is still another run's.
    let second = temp.path().join("second");
    let mut ema = PostHocEma::options(&second).checkpoint_every(20).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 60);
    std::fs::copy(second.join("0.60.safetensors"), dir.join("0.60.safetensors")).unwrap();
    assert!(Run::open(&dir).unwrap_err().to_string().contains("0.60.safetensors: another run's id"));
    assert!(text(PostHocEma::options(&dir).resume(&walk.model)).contains("another run's id"));
}

#[test]
fn an_older_state_does_not_go_on_under_newer_snapshots() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(20).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 20);
    let old = std::fs::read(dir.join("state.safetensors")).unwrap();
    train(&mut ema, &mut walk, 20);
    drop(ema);
    std::fs::write(dir.join("state.safetensors"), old).unwrap();
    let text = PostHocEma::options(&dir).resume(&walk.model).unwrap_err().to_string();
    assert!(text.contains("step 40") && text.contains("at step 20"), "{text}");
}

#[test]
fn a_damaged_state_is_refused() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(20).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 20);
    drop(ema);
    let path = dir.join("state.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 0x40;
    std::fs::write(&path, bytes).unwrap();
    let text = PostHocEma::options(&dir).resume(&walk.model).unwrap_err().to_string();
    assert!(text.contains("checksum") && text.contains("state.safetensors"), "{text}");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let (_temp, dir) = scratch();
    let model = Walk::new(1).model;
    let options = || PostHocEma::options(&dir);
    for (options, part) in [
        (options().sigma_rels([0.3]), "plain mean"),
        (options().betas([1.0]), "between 0 and 1"),
        (options().half_lives([0.0]), "half_life"),
        (options().gammas([-1.0]), "gamma"),
        (options().profiles([Profile::uniform(Window::Fraction(0.5)).unwrap()]), "cannot be tracked"),
        (options().sigma_rels([0.1, 0.1]), "given twice"),
        (options().update_every(0), "update_every"),
        (options().checkpoint_every(0), "checkpoint_every"),
        (options().max_checkpoints(0), "max_checkpoints"),
        (options().checkpoint_dtype(Dtype::I8), "checkpoint_dtype"),
        (options().shard_size(0), "shard_size"),
        (options().copy(["a[".to_owned()]), "copy"),
        (options().leave_out(["*"]), "no floating-point tensor"),
    ] {
        let text = options.create(&model).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
        assert!(!dir.exists());
    }
}

#[test]
fn targets_outside_the_run_are_refused() {
    let (temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 200);
    let run = Run::open(&dir).unwrap();
    let profile = Profile::sigma_rel(0.1).unwrap();
    assert!(
        run.plan(profile.clone(), At::Step(201))
            .unwrap_err()
            .to_string()
            .contains("after the last snapshot (step 200)")
    );
    assert!(
        run.plan(profile.clone(), At::Step(49))
            .unwrap_err()
            .to_string()
            .contains("before the first snapshot (step 50)")
    );
    let long = Profile::uniform(Window::Steps(201.0)).unwrap();
    assert!(run.plan(long, At::Latest).unwrap_err().to_string().contains("no longer than the target time"));
    let plan = run.plan(profile, At::Latest).unwrap();
    assert!(run.write(&plan, dir.join("x.safetensors")).unwrap_err().to_string().contains("nothing but its snapshots"));
    assert!(run.write(&plan, temp.path().join("no/where")).unwrap_err().to_string().contains("check the path"));
    let path = temp.path().join("same");
    let twice = [Output { plan: &plan, path: &path }; 2];
    assert!(run.write_all(&twice, &WriteOptions::default()).unwrap_err().to_string().contains("two targets"));
    assert!(!path.exists());
}
