//! Tests of runs whose tensors change: the new ones are averaged from their step on, the others as if nothing changed.

use super::*;
use crate::planning::Plan;
use crate::synthesis::Output;

/// Values of a tensor at one step; every element has a movement of its own.
fn moving(name: &str, elements: usize, step: u64) -> Vec<f32> {
    let of_name: u64 = name.bytes().map(u64::from).sum();
    let value = |i: usize| {
        let phase = (of_name + 7 * i as u64) as f64;
        ((step as f64 / 60.0 + phase).sin() + 0.01 * step as f64 + phase % 5.0) as f32
    };
    (0..elements).map(value).collect()
}

type Shape = (&'static str, usize);

const FIRST: [Shape; 3] = [("a", 37), ("head", 5), ("old", 3)];
const SECOND: [Shape; 4] = [("a", 37), ("adapter", 4), ("head", 9), ("norm", 2)];

/// Step of the extension, which is that of an update.
const CHANGE: u64 = 150;

fn model(shapes: &[Shape], step: u64) -> Vec<(&'static str, Vec<f32>)> {
    shapes.iter().map(|&(name, elements)| (name, moving(name, elements, step))).collect()
}

fn options(dir: &std::path::Path) -> Options {
    PostHocEma::options(dir).update_every(5).checkpoint_every(50).max_checkpoints(100)
}

fn train_to(ema: &mut PostHocEma, shapes: &[Shape], step: u64) {
    while ema.step() < step {
        ema.update(&model(shapes, ema.step() + 1)).unwrap();
    }
    ema.flush().unwrap();
}

/// Trains to step 400, with other tensors from [`CHANGE`] on.
fn extended(dir: &std::path::Path) -> PostHocEma {
    let mut ema = options(dir).create(&model(&FIRST, 0)).unwrap();
    train_to(&mut ema, &FIRST, CHANGE + 3);
    ema.save().unwrap();
    drop(ema);
    let mut ema = options(dir).extend(true).resume(&model(&SECOND, CHANGE)).unwrap();
    train_to(&mut ema, &SECOND, 400);
    ema
}

/// Computes the average of a tensor that began at `since` from the definition of the profile.
fn exact(name: &str, elements: usize, since: u64, profile: &Profile, at: u64) -> Vec<f64> {
    let times = (since..=at).filter(|time| time.is_multiple_of(5));
    let values = |time| moving(name, elements, time).into_iter().map(f64::from).collect();
    direct(&times.map(|time| (time, values(time))).collect::<Vec<_>>(), profile, at)
}

fn of(tensors: &Tensors, name: &str) -> Vec<f64> {
    tensors.get(name).unwrap().to_vec::<f32>().unwrap().into_iter().map(f64::from).collect()
}

#[test]
fn new_tensors_are_averaged_from_their_step_on_and_others_as_before() {
    let (temp, dir) = scratch();
    let ema = extended(&dir);
    let undisturbed = temp.path().join("undisturbed");
    let mut alone = options(&undisturbed).create(&model(&FIRST[..1], 0)).unwrap();
    train_to(&mut alone, &FIRST[..1], 400);
    let run = Run::open(&dir).unwrap();
    assert_eq!(run.extensions().len(), 1);
    let wanted = [0.05, 0.1, 0.15, 0.28].map(|sigma_rel| Profile::sigma_rel(sigma_rel).unwrap());
    for profile in &wanted {
        let plan = run.plan(profile.clone(), At::Latest).unwrap();
        let [later] = &plan.later[..] else { panic!("{:?}", plan.later) };
        assert_eq!((later.since, &later.tensors[..]), (CHANGE, &["adapter", "head", "norm"].map(String::from)[..]));
        assert!(later.weights.iter().all(|weight| weight.step > CHANGE), "{:?}", later.weights);
        let average = run.load(&plan).unwrap();
        assert_eq!(average.get("a"), alone.synthesize(profile.clone()).unwrap().get("a"));
        assert_eq!(ema.synthesize(profile.clone()).unwrap(), average);
        assert!(average.get("old").is_none());
        for (name, elements) in &SECOND[1..] {
            let exact = exact(name, *elements, CHANGE, profile, 400);
            let difference = largest_difference(&of(&average, name), &exact);
            // A blend is off by its relative error times the movement around the average, at most 5.
            assert!(difference < 5.0 * later.relative_error + 2e-6, "{profile} {name}: {difference:e} {later:?}");
        }
        // Lengths that were tracked are exact.
        let is_tracked = ema.profiles().contains(profile);
        assert!(!is_tracked || later.relative_error < 1e-7, "{later:?}");
    }
}

#[test]
fn every_way_to_synthesize_gives_the_bits_of_the_others() {
    let (temp, dir) = scratch();
    let ema = extended(&dir);
    let run = Run::open(&dir).unwrap();
    let plans = run.plans(&[0.07, 0.2].map(|s| Profile::sigma_rel(s).unwrap()), At::Latest).unwrap();
    let paths = [temp.path().join("0"), temp.path().join("1")];
    let outputs: Vec<Output<'_>> = plans.iter().zip(&paths).map(|(plan, path)| Output { plan, path }).collect();
    run.write_all(&outputs, &WriteOptions::default()).unwrap();
    let mut read = 0;
    let counter = std::sync::Mutex::new(&mut read);
    let options = WriteOptions { progress: Some(&|bytes| **counter.lock().unwrap() += bytes), ..Default::default() };
    run.write_all(&outputs, &options).unwrap();
    assert_eq!(read, run.bytes_to_read(&plans));
    for (plan, path) in plans.iter().zip(&paths) {
        let average = run.load(plan).unwrap();
        let file = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&file).unwrap();
        let mut live = model(&SECOND, 400);
        let swapped = run.swap_in(plan, &mut live).unwrap();
        for (name, values) in swapped.iter() {
            assert_eq!(file.tensor(name).unwrap().data(), average.get(name).unwrap().bytes);
            assert_eq!(bytemuck::cast_slice::<f32, u8>(values), average.get(name).unwrap().bytes);
        }
        swapped.restore().unwrap();
        assert_eq!(live, model(&SECOND, 400));
        ema.switch_to(plan.profile.clone(), &mut live).unwrap();
        assert_eq!(of(&average, "head"), live[2].1.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
    }
}

#[test]
fn earlier_step_has_the_tensors_of_that_step() {
    let (temp, dir) = scratch();
    drop(extended(&dir));
    let run = Run::open(&dir).unwrap();
    let names = |at| run.tensors_at(at).into_iter().map(|spec| spec.name).collect::<Vec<_>>();
    assert_eq!(names(CHANGE), ["a", "head", "old"]);
    assert_eq!(names(400), ["a", "adapter", "head", "norm"]);
    let profile = Profile::sigma_rel(0.28).unwrap();
    let early = run.plan(profile.clone(), At::Step(CHANGE)).unwrap();
    assert!(early.later.is_empty());
    let average = run.load(&early).unwrap();
    for (name, elements) in FIRST {
        let difference = largest_difference(&of(&average, name), &exact(name, elements, 5, &profile, CHANGE));
        assert!(difference < 2e-6, "{name}: {difference:e}");
    }
    let late = run.plan(profile, At::Latest).unwrap();
    let both = [&early, &late].map(|plan| Output { plan, path: temp.path() });
    let text = run.write_all(&both, &WriteOptions::default()).unwrap_err().to_string();
    assert!(text.contains("extended between the steps 150 and 400"), "{text}");
}

#[test]
fn resume_keeps_extensions_and_refuses_other_tensors_without_the_option() {
    let (_temp, dir) = scratch();
    let mut ema = extended(&dir);
    ema.finish().unwrap();
    drop(ema);
    for shapes in [&FIRST[..], &SECOND[..3]] {
        options(&dir).resume(&model(shapes, 400)).unwrap_err();
    }
    let mut ema = options(&dir).extend(true).resume(&model(&SECOND, 400)).unwrap();
    assert_eq!(ema.extensions.len(), 1, "nothing changed, so nothing is recorded");
    train_to(&mut ema, &SECOND, 450);
    drop(ema);
    let mut ema = options(&dir).extend(true).resume(&model(&SECOND[..2], 450)).unwrap();
    train_to(&mut ema, &SECOND[..2], 600);
    let profile = Profile::sigma_rel(0.28).unwrap();
    let average = Run::open(&dir).unwrap();
    let plan = average.plan(profile.clone(), At::Latest).unwrap();
    let average = average.load(&plan).unwrap();
    assert_eq!(average.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "adapter"]);
    let difference = largest_difference(&of(&average, "adapter"), &exact("adapter", 4, CHANGE, &profile, 600));
    assert!(difference < 2e-6, "{difference:e}");
}

#[test]
fn model_of_another_dtype_goes_on() {
    let (_temp, dir) = scratch();
    let half = |step| {
        let mut tensors = Tensors::default();
        for (name, values) in model(&FIRST, step) {
            let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            tensors.insert(name, Tensor::new(&[values.len()], &values).unwrap());
        }
        tensors
    };
    let mut ema = options(&dir).create(&model(&FIRST, 0)).unwrap();
    train_to(&mut ema, &FIRST, 100);
    drop(ema);
    let mut ema = options(&dir).extend(true).resume(&half(100)).unwrap();
    assert_eq!(ema.step(), 100);
    for step in 101..=200 {
        ema.update(&half(step)).unwrap();
    }
    ema.flush().unwrap();
    let run = Run::open(&dir).unwrap();
    let profile = Profile::sigma_rel(0.28).unwrap();
    let plan: Plan = run.plan(profile.clone(), At::Latest).unwrap();
    assert!(plan.later.is_empty() && plan.relative_error < 1e-7);
    let average = run.load(&plan).unwrap();
    for (name, elements) in FIRST {
        let tensor = average.get(name).unwrap();
        assert_eq!(tensor.dtype, Dtype::BF16);
        let got: Vec<f64> = tensor.to_vec::<bf16>().unwrap().into_iter().map(f64::from).collect();
        // Parameters and result have 8 bits of a value below 10.
        assert!(largest_difference(&got, &exact(name, elements, 5, &profile, 200)) < 0.06, "{name}");
    }
}

#[test]
fn large_error_of_tensors_that_began_later_is_a_shortfall_of_the_plan() {
    let (_temp, dir) = scratch();
    let mut ema = options(&dir).create(&model(&FIRST, 0)).unwrap();
    train_to(&mut ema, &FIRST, CHANGE);
    drop(ema);
    let mut ema = options(&dir).extend(true).resume(&model(&SECOND, CHANGE)).unwrap();
    train_to(&mut ema, &SECOND, CHANGE + 25);
    let plan = ema.plan(Profile::sigma_rel(0.1).unwrap()).unwrap();
    assert!(plan.relative_error < 0.05 && plan.later[0].relative_error > 0.05, "{plan:?}");
    let text = crate::planning::warnings([&plan]).remove(0);
    let percent = 100.0 * plan.later[0].relative_error;
    let percent = if percent < 10.0 { format!("{percent:.1}%") } else { format!("{percent:.0}%") };
    assert!(text.contains("for 3 of its tensors, which began at step 150, averages of"), "{text}");
    assert!(text.contains(&format!("has a relative error of {percent}: ")), "{text}");
}

#[test]
fn extension_before_the_first_update_leaves_no_trace() {
    let (_temp, dir) = scratch();
    let mut ema = options(&dir).create(&model(&FIRST, 0)).unwrap();
    ema.update(&model(&FIRST, 1)).unwrap();
    ema.save().unwrap();
    drop(ema);
    let mut ema = options(&dir).extend(true).resume(&model(&SECOND, 1)).unwrap();
    train_to(&mut ema, &SECOND, 100);
    let run = Run::open(&dir).unwrap();
    assert!(run.extensions().is_empty());
    let profile = Profile::sigma_rel(0.28).unwrap();
    let average = run.load(&run.plan(profile.clone(), At::Latest).unwrap()).unwrap();
    for (name, elements) in SECOND {
        let difference = largest_difference(&of(&average, name), &exact(name, elements, 5, &profile, 100));
        assert!(difference < 2e-6, "{name}: {difference:e}");
    }
}

#[test]
fn extension_at_no_update_is_damage() {
    let (_temp, dir) = scratch();
    drop(extended(&dir));
    let files = crate::snapshot::list(&dir).unwrap();
    let path = &files.last_key_value().unwrap().1[0];
    let bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(6).position(|window| window == b"t\\\":15").unwrap();
    let mut damaged = bytes;
    damaged[at + 4..at + 7].copy_from_slice(b"151");
    std::fs::write(path, damaged).unwrap();
    Run::open(&dir).unwrap_err();
}

#[test]
fn new_tensors_must_begin_with_finite_values() {
    let (_temp, dir) = scratch();
    let mut ema = options(&dir).create(&model(&FIRST, 0)).unwrap();
    train_to(&mut ema, &FIRST, CHANGE);
    ema.finish().unwrap();
    drop(ema);
    let mut bad = model(&SECOND, CHANGE);
    bad[2].1[8] = f32::NAN;
    let resume = |model, reaction| options(&dir).on_non_finite(reaction).extend(true).resume(&model);
    for reaction in [OnNonFinite::Raise, OnNonFinite::Skip] {
        let text = resume(bad.clone(), reaction).unwrap_err().to_string();
        assert!(text.contains("`head`") && text.contains("NaN at element 8"), "{text}");
    }
    drop(resume(bad, OnNonFinite::Ignore).unwrap());
    // Tensors that go on keep their averages, whatever the model holds.
    let mut other = model(&SECOND, CHANGE);
    other[0].1[0] = f32::INFINITY;
    drop(resume(other, OnNonFinite::Raise).unwrap());
}
