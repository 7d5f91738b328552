//! Tests of tensors and options: treatment and refusal.

use super::*;

/// Returns a model with every kind of tensor.
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
fn every_dtype_is_averaged_copied_or_left_out_and_restored() {
    let (temp, dir) = scratch();
    let options = || PostHocEma::options(&dir).checkpoint_every(10).copy(["*.running_*"]).leave_out(["frozen.*"]);
    let mut ema = options().update_every(1).create(&mixed(0)).unwrap();
    for step in 1..=20 {
        ema.update(&mixed(step)).unwrap();
    }
    ema.flush().unwrap();
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap();
    let average = run.load(&plan).unwrap();
    assert_eq!(average.len(), 8);
    assert_eq!(average.get("steps").unwrap(), mixed(20).get("steps").unwrap());
    assert_eq!(average.get("mask").unwrap(), mixed(20).get("mask").unwrap());
    assert_eq!(average.get("norm.running_var").unwrap(), mixed(20).get("norm.running_var").unwrap());
    // 20 updates of two profiles determine the plain mean within a few percent.
    let mean = average.get("f64").unwrap().to_vec::<f64>().unwrap()[0];
    assert!((mean - 10.5).abs() < 0.5, "{mean}");
    for (name, tensor) in average.iter() {
        let original = mixed(0).get(name).unwrap().clone();
        assert_eq!((tensor.dtype, &tensor.shape), (original.dtype, &original.shape));
    }
    let path = temp.path().join("out");
    run.write_all(
        &[Output { plan: &plan, path: &path }],
        &WriteOptions { dtype: Some(Dtype::F32), ..WriteOptions::default() },
    )
    .unwrap();
    let file = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(file.tensor("bf16").unwrap().dtype(), Dtype::F32);
    assert_eq!(file.tensor("steps").unwrap().dtype(), Dtype::I64);
    // A resume checks the copied tensors too.
    ema.save().unwrap();
    drop(ema);
    let fewer: Tensors = mixed(3).into_iter().filter(|(name, _)| name != "steps").collect();
    let text = options().resume(&fewer).unwrap_err().to_string();
    assert!(text.contains("`steps`: the tensor is missing, but was copied"), "{text}");
    let mut more = mixed(3);
    more.insert("new", Tensor::new(&[1], &[1i64]).unwrap());
    let text = options().resume(&more).unwrap_err().to_string();
    assert!(text.contains("`new`: the tensor is new, but was missing when the run began"), "{text}");
    let ema = options().resume(&mixed(3)).unwrap();
    assert_eq!(ema.synthesize(Profile::gamma(0.0).unwrap()).unwrap().get("steps"), mixed(20).get("steps"));
}

#[test]
fn dtypes_without_a_default_treatment_are_refused() {
    for dtype in [Dtype::F8_E4M3, Dtype::C64] {
        let size = dtype.bitsize() / 8;
        let mut model = mixed(0);
        model.insert("odd", Tensor { dtype, shape: vec![2], bytes: vec![0; 2 * size] });
        let (_temp, dir) = scratch();
        let text = PostHocEma::options(&dir).create(&model).unwrap_err().to_string();
        assert!(text.contains("`odd`") && text.contains("to copy or to leave out"), "{text}");
        assert_eq!(text.contains("track its master weights in f32 or bf16"), dtype == Dtype::F8_E4M3, "{text}");
        assert!(!dir.exists());
        PostHocEma::options(&dir).copy(["odd"]).create(&model).unwrap();
    }
}

/// Model with a parameter and four buffers, all of the value of the step.
struct Buffered(f32);

impl Parameters for Buffered {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let values = [[self.0; 2]; 5];
        let names = ["weight", "weight_u", "mask", "norm.running_mean", "head.0.running_var"];
        let mut views = Vec::new();
        for (name, values) in names.into_iter().zip(&values) {
            let view = TensorView::host(name, Dtype::F32, &[2], bytemuck::cast_slice(values.as_slice()))?;
            views.push(if name == "weight" { view } else { view.as_buffer() });
        }
        let scale = TensorView::host("scale", Dtype::F8_E4M3, &[2], &[1, 2])?;
        views.push(scale.as_buffer());
        read(&views)
    }
}

#[test]
fn buffers_are_copied_except_for_batch_statistics() {
    let averaged = |options: Options| {
        let mut ema = options.update_every(1).update_after_step(0).create(&Buffered(0.0)).unwrap();
        for step in 1..=4u8 {
            ema.update(&Buffered(f32::from(step))).unwrap();
        }
        let mean = ema.synthesize(Profile::gamma(0.0).unwrap()).unwrap();
        let value = |name: &str| mean.get(name).unwrap().to_vec::<f32>().unwrap()[0];
        let expected = |name: &String| if ema.averaged().contains(name) { 2.5 } else { 4.0 };
        for name in ["weight", "weight_u", "mask", "norm.running_mean", "head.0.running_var"].map(String::from) {
            assert!((value(&name) - expected(&name)).abs() < 0.2, "{name}: {}", value(&name));
        }
        assert_eq!(mean.get("scale").unwrap().bytes, [1, 2]);
        ema.averaged()
    };
    let (_temp, dir) = scratch();
    let statistics = ["head.0.running_var", "norm.running_mean"];
    assert_eq!(averaged(PostHocEma::options(dir.join("1"))), [statistics.as_slice(), &["weight"]].concat());
    // A name of a buffer is an exception; one of a parameter leaves the others out of the averages.
    let with_mask = ["head.0.running_var", "mask", "norm.running_mean", "weight"];
    assert_eq!(averaged(PostHocEma::options(dir.join("2")).average(["mask"])), with_mask);
    assert_eq!(averaged(PostHocEma::options(dir.join("3")).average(["wei*t", "mask"])), ["mask", "weight"]);
    assert_eq!(averaged(PostHocEma::options(dir.join("4")).copy(["norm.*", "head.*"])), ["weight"]);
    let text = PostHocEma::options(dir.join("5")).average(["scale"]).create(&Buffered(0.0)).unwrap_err().to_string();
    assert!(text.contains("`scale`: F8_E4M3 cannot be averaged"), "{text}");
}

/// Same tensors, all of them lent as parameters.
struct Unmarked(f32);

impl Parameters for Unmarked {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        Buffered(self.0).with_tensors(&mut |views| {
            let unmarked: Vec<_> = views.iter().map(|view| TensorView { is_buffer: false, ..*view }).collect();
            read(&unmarked)
        })
    }
}

#[test]
fn resumed_run_averages_the_buffers_that_it_averaged() {
    let (_temp, dir) = scratch();
    let options = || PostHocEma::options(&dir).update_every(1).update_after_step(0).copy(["scale"]);
    let all = ["head.0.running_var", "mask", "norm.running_mean", "weight", "weight_u"];
    let mut ema = options().create(&Unmarked(0.0)).unwrap();
    ema.update(&Unmarked(1.0)).unwrap();
    ema.save().unwrap();
    drop(ema);
    let mut ema = options().resume(&Buffered(0.0)).unwrap();
    assert_eq!(ema.averaged(), all);
    ema.update(&Buffered(2.0)).unwrap();
    ema.save().unwrap();
    drop(ema);
    assert_eq!(options().resume(&Buffered(0.0)).unwrap().averaged(), all);
}

/// Model with two tied tensors.
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
    assert_eq!(run.snapshots()[0].tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["head"], "the first");
    assert_eq!(run.snapshots()[0].files()[0].metadata()["embedding"], "head");
    let average = run.load(&run.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap()).unwrap();
    assert_eq!(average.get("head"), average.get("embedding"));
    assert_eq!(average.len(), 2);
    model.apart.set(true);
    let text = ema.update(&model).unwrap_err().to_string();
    let expected = "`embedding`: its memory is separate, but was shared with `head` when the run began";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn values_beyond_f16_are_stored_in_f32() {
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
fn patterns_match_any_name_of_a_tied_tensor() {
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
fn patterns_choose_the_averaged_tensors() {
    let (_temp, dir) = scratch();
    let model =
        |v: f32| vec![("layers[0].lora_a", vec![v]), ("layers[0].weight", vec![v]), ("layers[1].lora_a", vec![v])];
    let options = || PostHocEma::options(&dir).update_every(1).checkpoint_every(2);
    for (options, part) in [
        (options().copy(["*.loar_*"]), "`*.loar_*` matches no tensor"),
        (options().average(["nothing"]), "`nothing` matches no tensor"),
        (options().leave_out(["layers[2].weight"]), "`layers[2].weight` matches no tensor"),
    ] {
        let text = options.create(&model(0.0)).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    // A tensor named under `average` must be of a floating-point dtype; all others are copied in any dtype.
    let mut odd = mixed(0);
    odd.insert("base", Tensor { dtype: Dtype::F8_E4M3, shape: vec![2], bytes: vec![0; 2] });
    let text = options().average(["f32", "steps"]).create(&odd).unwrap_err().to_string();
    assert!(text.contains("`steps`: I64 cannot be averaged"), "{text}");
    let (_elsewhere, elsewhere) = scratch();
    PostHocEma::options(&elsewhere).average(["f32"]).create(&odd).unwrap();
    // A name with brackets is a glob too, but matches the tensor of that name.
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
fn views_of_wrong_size_are_refused() {
    struct Lying(usize);
    impl Parameters for Lying {
        fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
            let bytes = [0u8; 64];
            let memory = crate::tensor::Memory::Host(&bytes[..self.0]);
            let (part, is_replica) = (None, false);
            read(&[TensorView {
                name: "w",
                dtype: Dtype::F32,
                shape: &[4],
                memory,
                is_buffer: false,
                part,
                is_replica,
            }])
        }
    }
    let (_temp, dir) = scratch();
    assert!(PostHocEma::options(&dir).create(&Lying(20)).unwrap_err().to_string().contains("20 bytes were lent"));
    let mut ema = PostHocEma::options(&dir).update_every(1).create(&Lying(16)).unwrap();
    assert!(ema.update(&Lying(12)).unwrap_err().to_string().contains("12 bytes were lent"));
    // A refused call has no effect.
    assert_eq!(ema.step(), 0);
    assert_eq!(ema.update(&Lying(16)).unwrap(), UpdateOutcome::Updated);
}

#[test]
fn changed_parameters_are_refused_without_effect() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(7);
    let mut ema = PostHocEma::options(&dir).update_every(1).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 3);
    let before = averages(&ema)[0].high.clone();
    let base = walk.model.clone();
    let renamed: Model = base.iter().map(|(n, v)| (if *n == "c.bias" { "d.bias" } else { n }, v.clone())).collect();
    let grown: Model = base.iter().map(|(n, v)| (*n, [v.clone(), vec![0.0]].concat())).collect();
    let doubles: Vec<(&str, Vec<f64>)> =
        base.iter().map(|(n, v)| (*n, v.iter().map(|&x| x.into()).collect())).collect();
    let twice: Model = [base.clone(), base[..1].to_vec()].concat();
    for (error, part) in [
        (ema.update(&renamed).unwrap_err(), "`d.bias`: the tensor is new, but was missing when the run began"),
        (ema.update(&base[..2].to_vec()).unwrap_err(), "`c.bias`: the tensor is missing, but was present"),
        (ema.update(&grown).unwrap_err(), "`a.weight`: its shape is [38], but was [37]"),
        (ema.update(&doubles).unwrap_err(), "`a.weight`: its dtype is F64, but was F32"),
        (ema.update(&twice).unwrap_err(), "occurs twice"),
    ] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(averages(&ema)[0].high, before);
    // The order of the tensors may change.
    let reversed: Model = base.iter().rev().cloned().collect();
    assert_eq!(ema.update(&reversed).unwrap(), UpdateOutcome::Updated);
}

#[test]
fn invalid_options_are_refused() {
    let (_temp, dir) = scratch();
    let model = Walk::new(1).model;
    let options = || PostHocEma::options(&dir);
    for (options, part) in [
        (options().sigma_rels([0.3]), "plain mean"),
        (options().betas([1.0]), "a decay per step must be above 0 and below 1"),
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

/// Checks that the estimate before the first step is at least the length of the written header, and little more.
#[test]
fn header_len_bounds_the_written_header() {
    for name in ["w", "a \"quoted\" name", "layers.0.self_attn.q_proj.weight", "\u{1}\u{4e2d}\n"] {
        let (_temp, dir) = scratch();
        let tensor = || Tensor::new(&[1, 2, 3], &[0.5f32; 6]).unwrap();
        let model: Tensors = (0..3000).map(|i| (format!("{name}{i}"), tensor())).collect();
        let mut ema = PostHocEma::options(&dir).create(&model).unwrap();
        ema.update(&model).unwrap();
        ema.save().unwrap();
        let bytes = std::fs::read(dir.join("state.safetensors")).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let estimate = state::header_len(&ema.registry, &ema.settings) - state::REST;
        assert!(header <= estimate + 10_000 && estimate <= header * 13 / 10, "{name}: {estimate}, and takes {header}");
    }
}
