//! Tests of synthesis into the caller's memory.

use super::*;
use crate::tensor::TensorViewMut;

const SIGMA_RELS: [f64; 3] = [0.06, 0.1, 0.2];

fn model(step: u64) -> Tensors {
    let wave = |n: usize| (0..n).map(|i| ((i as f32) * 0.7 + step as f32).sin()).collect::<Vec<f32>>();
    let bf16: Vec<half::bf16> = wave(3).into_iter().map(half::bf16::from_f32).collect();
    let mut model = Tensors::default();
    model.insert("large", Tensor::new(&[2, 70_001], &wave(140_002)).unwrap());
    model.insert("half", Tensor::new(&[3], &bf16).unwrap());
    model.insert("empty", Tensor::new::<f32>(&[0, 4], &[]).unwrap());
    model.insert("steps", Tensor::new(&[], &[step as i64]).unwrap());
    model
}

fn trained(dir: &std::path::Path) -> PostHocEma {
    let mut ema = PostHocEma::options(dir).update_every(1).checkpoint_every(10).create(&model(0)).unwrap();
    for step in 1..=35 {
        ema.update(&model(step)).unwrap();
    }
    ema
}

/// Returns poisoned memory for a target, in the model's dtypes except for those given.
fn memory(model: &Tensors, dtypes: &[(&str, Dtype)]) -> Tensors {
    let tensor = |(name, tensor): (&str, &Tensor)| {
        let dtype = dtypes.iter().find(|(other, _)| *other == name).map_or(tensor.dtype, |(_, dtype)| *dtype);
        let bytes = vec![0x7f; tensor.shape.iter().product::<usize>() * dtype.bitsize() / 8];
        (name.to_owned(), Tensor { dtype, shape: tensor.shape.clone(), bytes })
    };
    model.iter().map(tensor).collect()
}

fn views(memory: &mut [(String, Tensor)]) -> Vec<TensorViewMut<'_>> {
    memory.iter_mut().map(|(name, t)| TensorViewMut::host(name, t.dtype, &t.shape, &mut t.bytes).unwrap()).collect()
}

/// Calls `load` with memory for each target and returns the filled memory.
fn filled(
    dtypes: &[(&str, Dtype)],
    targets: usize,
    load: impl FnOnce(Vec<Vec<TensorViewMut<'_>>>) -> Result<()>,
) -> Result<Vec<Tensors>> {
    let mut memories: Vec<Vec<(String, Tensor)>> =
        (0..targets).map(|_| memory(&model(0), dtypes).into_iter().collect()).collect();
    load(memories.iter_mut().map(|memory| views(memory)).collect())?;
    Ok(memories.into_iter().map(|memory| memory.into_iter().collect()).collect())
}

fn profiles() -> Vec<Profile> {
    SIGMA_RELS.map(|sigma_rel| Profile::sigma_rel(sigma_rel).unwrap()).to_vec()
}

#[test]
fn load_into_equals_synthesizing_each_target() {
    let dir = tempfile::tempdir().unwrap();
    let mut ema = trained(dir.path());
    let live = filled(&[], 3, |memory| ema.load_into(&profiles(), memory, None).map(drop)).unwrap();
    for (target, profile) in live.iter().zip(profiles()) {
        assert!(*target == ema.synthesize(profile).unwrap());
    }
    ema.finish().unwrap();
    let run = crate::Run::open(dir.path()).unwrap();
    let plans = run.plans(&profiles(), At::Step(30)).unwrap();
    let read = std::sync::atomic::AtomicU64::new(0);
    let progress = |bytes| {
        read.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    };
    let stored = filled(&[], 3, |memory| run.load_into(&plans, memory, Some(&progress))).unwrap();
    assert_eq!(read.into_inner(), run.bytes_to_read(&plans));
    for (target, plan) in stored.iter().zip(&plans) {
        assert!(*target == run.load(plan).unwrap());
    }
    let names: Vec<_> = run.tensors().into_iter().map(|tensor| (tensor.name, tensor.dtype)).collect();
    let expected = [("empty", Dtype::F32), ("half", Dtype::BF16), ("large", Dtype::F32), ("steps", Dtype::I64)];
    assert_eq!(names, expected.map(|(name, dtype)| (name.to_owned(), dtype)));
}

#[test]
fn load_into_another_dtype_rounds_once() {
    let dir = tempfile::tempdir().unwrap();
    let ema = trained(dir.path());
    let wide = filled(&[("half", Dtype::F64)], 1, |m| ema.load_into(&profiles()[..1], m, None).map(drop)).unwrap();
    let own = ema.synthesize(profiles().remove(0)).unwrap();
    let wide: Vec<f64> = wide[0].get("half").unwrap().to_vec().unwrap();
    let rounded: Vec<half::bf16> = wide.iter().map(|&x| half::bf16::from_f32(x as f32)).collect();
    assert_eq!(Some(rounded), own.get("half").unwrap().to_vec());
}

#[test]
fn load_tracked_into_copies_the_running_average() {
    let dir = tempfile::tempdir().unwrap();
    let ema = trained(dir.path());
    let itself = filled(&[("half", Dtype::F32)], 1, |mut m| ema.load_tracked_into(1, m.remove(0))).unwrap();
    let held = ema.engine.values().unwrap();
    let high = &held.values().averages[1].high;
    for (name, place) in [("half", 1), ("large", 2)] {
        let place = ema.registry.layout().range(place);
        assert_eq!(itself[0].get(name).unwrap().to_vec::<f32>().unwrap(), high[place], "{name}");
    }
    let text = filled(&[], 1, |mut m| ema.load_tracked_into(2, m.remove(0))).unwrap_err().to_string();
    assert!(text.contains("index 2 is out of range: 2 profiles are tracked"), "{text}");
}

#[test]
fn load_into_refuses_unfit_memory() {
    let dir = tempfile::tempdir().unwrap();
    let ema = trained(dir.path());
    let load = |memory: &mut Vec<Vec<(String, Tensor)>>, targets: usize| {
        let lent = memory.iter_mut().map(|memory| views(memory)).collect();
        ema.load_into(&profiles()[..targets], lent, None).unwrap_err().to_string()
    };
    let whole = || -> Vec<(String, Tensor)> { memory(&model(0), &[]).into_iter().collect() };
    let changed = |name: &str, tensor: Tensor| {
        let mut memory = whole();
        memory.iter_mut().filter(|(other, _)| other == name).for_each(|(_, own)| *own = tensor.clone());
        vec![memory]
    };
    let mut extra = vec![whole()];
    extra[0].push(("other".into(), Tensor::new(&[1], &[0f32]).unwrap()));
    let mut twice = vec![whole()];
    let first = twice[0][0].clone();
    twice[0].push(first);
    let wide: Vec<_> = memory(&model(0), &[("half", Dtype::F32)]).into_iter().collect();
    for (mut memory, targets, expected) in [
        (vec![whole()], 2, "1 lists of views were given for 2 targets: give one for each"),
        (vec![whole()[1..].to_vec()], 1, "`empty`: no memory was given"),
        (extra, 1, "`other`: the run has no tensor"),
        (twice, 1, "`empty`: the name occurs twice"),
        (changed("half", Tensor::new(&[4], &[0f32; 4]).unwrap()), 1, "`half`: memory for F32 [4] was given"),
        (changed("half", Tensor::new(&[3], &[0i32; 3]).unwrap()), 1, "`half`: memory for I32 [3] was given"),
        (
            changed("steps", Tensor::new(&[], &[0i32]).unwrap()),
            1,
            "`steps`: memory for I32 [] was given, but it is I64",
        ),
        (vec![whole(), wide], 2, "`half`: one target wants BF16 and another F32"),
    ] {
        let text = load(&mut memory, targets);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn is_due_predicts_updates() {
    let dir = tempfile::tempdir().unwrap();
    let options = PostHocEma::options(dir.path()).update_every(4).checkpoint_every(10).update_after_step(5);
    let mut ema = options.create(&model(0)).unwrap();
    for step in 1..=40 {
        let due = ema.is_due();
        assert_eq!(due, ema.update(&model(step)).unwrap() != UpdateOutcome::Skipped, "{step}");
    }
}

#[test]
fn into_saved_weights_restores_later() {
    let dir = tempfile::tempdir().unwrap();
    let ema = trained(dir.path());
    let mut params = model(7);
    let originals = ema.swap_in(profiles().remove(1), &mut params).unwrap().into_saved_weights();
    assert!(params == ema.synthesize(profiles().remove(1)).unwrap());
    originals.restore(&mut params).unwrap();
    assert!(params == model(7));
}

#[test]
fn swap_in_refuses_an_unfit_copied_tensor_before_any_change() {
    let dir = tempfile::tempdir().unwrap();
    let ema = trained(dir.path());
    let mut params = model(7);
    params.insert("steps", Tensor::new(&[], &[1i32]).unwrap());
    let before = params.clone();
    let text = ema.swap_in(profiles().remove(1), &mut params).unwrap_err().to_string();
    assert!(text.contains("`steps`: the tensor is I32 [], but was I64 [] in the run"), "{text}");
    assert!(params == before);
}
