//! Reads and writes candle's tensors, and tracks a training.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use candle_core::{DType, Device, Module, Storage, Tensor, Var};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use posthoc_ema::{Dtype, Error, Memory, Parameters, ParametersMut, PostHocEma, Profile, Run, TensorView};
use posthoc_ema_candle::{NamedTensors, NamedVars, Variables};

const CPU: &Device = &Device::Cpu;

/// Name, dtype, shape, address and bytes of a view.
type ViewContent = (String, Dtype, Vec<usize>, usize, Vec<u8>);

fn host_bytes<'a>(view: &TensorView<'a>) -> &'a [u8] {
    let Memory::Host(bytes) = view.memory else { panic!("{} is not in host memory", view.name) };
    bytes
}

/// Reads all views.
fn read_views(params: &impl Parameters) -> Vec<ViewContent> {
    let mut all = Vec::new();
    let read = &mut |views: &[TensorView<'_>]| {
        all = views
            .iter()
            .map(|v| {
                (v.name.to_owned(), v.dtype, v.shape.to_vec(), host_bytes(v).as_ptr().addr(), host_bytes(v).to_vec())
            })
            .collect();
        Ok(())
    };
    params.with_tensors(read).unwrap();
    all
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Makes a map with two layers, and their mean square as a loss.
fn model(dtype: DType) -> (VarMap, impl Fn(&Tensor) -> Tensor) {
    let vars = VarMap::new();
    let builder = VarBuilder::from_varmap(&vars, dtype, CPU);
    let first = candle_nn::linear(3, 5, builder.pp("first")).unwrap();
    let second = candle_nn::linear(5, 2, builder.pp("second")).unwrap();
    let loss = move |x: &Tensor| {
        let y = second.forward(&first.forward(x).unwrap().silu().unwrap()).unwrap();
        y.sqr().unwrap().mean_all().unwrap()
    };
    (vars, loss)
}

fn var(vars: &VarMap, name: &str) -> Var {
    vars.data().lock().unwrap()[name].clone()
}

fn put(vars: &VarMap, name: &str, var: Var) {
    vars.data().lock().unwrap().insert(name.to_owned(), var);
}

fn storage_address(tensor: &Tensor) -> usize {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(candle_core::CpuStorage::F32(values)) = &*storage else { panic!("not f32") };
    values[layout.start_offset()..].as_ptr().addr()
}

#[test]
fn var_map_is_read_in_place_and_in_name_order() {
    let (vars, loss) = model(DType::F32);
    let before = read_views(&Variables(&vars));
    let names: Vec<&str> = before.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, ["first.bias", "first.weight", "second.bias", "second.weight"]);
    for (name, dtype, shape, address, bytes) in &before {
        let var = var(&vars, name);
        assert_eq!((*dtype, shape.as_slice(), *address), (Dtype::F32, var.dims(), storage_address(&var)), "{name}");
        assert_eq!(*bytes, bytes_of(&values(&var)), "{name}");
    }
    // A step of the optimiser changes the values, but not their addresses.
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.1).unwrap();
    optimizer.backward_step(&loss(&Tensor::ones((4, 3), DType::F32, CPU).unwrap())).unwrap();
    let after = read_views(&Variables(&vars));
    assert!(before.iter().zip(&after).all(|(before, after)| before.3 == after.3 && before.4 != after.4));
}

#[test]
fn every_dtype_is_read_and_written() {
    let expected = [
        (DType::U8, Dtype::U8, vec![1u8, 2]),
        (DType::U32, Dtype::U32, vec![1, 0, 0, 0, 2, 0, 0, 0]),
        (DType::I16, Dtype::I16, vec![1, 0, 2, 0]),
        (DType::I32, Dtype::I32, vec![1, 0, 0, 0, 2, 0, 0, 0]),
        (DType::I64, Dtype::I64, vec![1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
        (DType::BF16, Dtype::BF16, vec![0x80, 0x3f, 0, 0x40]),
        (DType::F16, Dtype::F16, vec![0, 0x3c, 0, 0x40]),
        (DType::F32, Dtype::F32, vec![0, 0, 0x80, 0x3f, 0, 0, 0, 0x40]),
        (DType::F64, Dtype::F64, vec![0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0, 0, 0, 0, 0, 0, 0, 0x40]),
        (DType::F8E4M3, Dtype::F8_E4M3, vec![0x38, 0x40]),
    ];
    for (dtype, stored, bytes) in expected {
        let name = "w".to_owned();
        let mut vars = [(name, Var::from_tensor(&Tensor::from_raw_buffer(&bytes, dtype, &[2], CPU).unwrap()).unwrap())];
        let got = read_views(&NamedVars::from(&vars[..])).remove(0);
        assert_eq!((got.1, got.2, &got.4), (stored, vec![2], &bytes), "{dtype:?}");
        let half = bytes.len() / 2;
        let swap = &mut |view: posthoc_ema::TensorViewMut<'_>| {
            view.into_host_bytes().unwrap().rotate_left(half);
            Ok(())
        };
        NamedVars::from(&vars[..]).for_each_mut(swap).unwrap();
        let mut swapped = bytes.clone();
        swapped.rotate_left(half);
        assert_eq!(read_views(&NamedVars::from(&vars[..])).remove(0).4, swapped, "{dtype:?}");
        vars[0].0 = "other".to_owned();
        assert_eq!(read_views(&NamedVars::from(&vars[..])).remove(0).0, "other");
    }
}

#[test]
fn scalars_and_empty_tensors_are_read_and_written() {
    let vars = VarMap::new();
    put(&vars, "scalar", Var::new(3f32, CPU).unwrap());
    put(&vars, "empty", Var::zeros((0, 3), DType::F32, CPU).unwrap());
    let got = read_views(&Variables(&vars));
    assert_eq!((&got[0].2, got[0].4.len()), (&vec![0, 3], 0));
    assert_eq!((&got[1].2, &got[1].4), (&vec![], &bytes_of(&[3.0])));
    let mut lengths = Vec::new();
    let write = &mut |view: posthoc_ema::TensorViewMut<'_>| {
        let bytes = view.into_host_bytes().unwrap();
        lengths.push(bytes.len());
        bytes.fill(0);
        Ok(())
    };
    Variables(&vars).for_each_mut(write).unwrap();
    assert_eq!((lengths, values(&var(&vars, "scalar"))), (vec![0, 4], vec![0.0]));
}

#[test]
fn strided_tensors_are_copied_and_contiguous_windows_read_in_place() {
    let whole = Tensor::arange(0f32, 12.0, CPU).unwrap().reshape((3, 4)).unwrap();
    let tensors = HashMap::from([
        ("a.transposed".to_owned(), whole.t().unwrap()),
        ("b.columns".to_owned(), whole.narrow(1, 1, 2).unwrap()),
        ("c.repeated".to_owned(), whole.narrow(0, 1, 1).unwrap().expand((2, 4)).unwrap()),
        ("d.rows".to_owned(), whole.narrow(0, 1, 2).unwrap()),
        ("e.whole".to_owned(), whole.clone()),
    ]);
    let got = read_views(&NamedTensors::from(&tensors));
    for (name, _, shape, _, bytes) in &got {
        assert_eq!((shape.as_slice(), bytes), (tensors[name].dims(), &bytes_of(&values(&tensors[name]))), "{name}");
    }
    assert_eq!((got[3].3, got[4].3), (storage_address(&whole) + 16, storage_address(&whole)));
}

#[test]
fn tied_variables_do_not_deadlock_with_a_writer() {
    let vars = VarMap::new();
    let shared = Var::new(1f32, CPU).unwrap();
    put(&vars, "decoder.weight", shared.clone());
    put(&vars, "embedding.weight", shared.clone());
    let got = read_views(&Variables(&vars));
    assert_eq!((got[0].3, &got[0].4), (got[1].3, &got[1].4));

    // With two reads of one lock, a writer that waits between them would deadlock both threads.
    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (stop, twos) = (stop.clone(), Tensor::new(2f32, CPU).unwrap());
        move || {
            while !stop.load(Ordering::Relaxed) {
                shared.set(&twos).unwrap();
            }
        }
    });
    let (done, finished) = mpsc::channel();
    std::thread::spawn(move || {
        for _ in 0..20_000 {
            Variables(&vars).with_tensors(&mut |_| Ok(())).unwrap();
        }
        done.send(()).unwrap();
    });
    finished.recv_timeout(Duration::from_secs(60)).expect("the reader and the writer wait for each other");
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}

#[test]
fn layers_see_written_values_and_errors_are_returned() {
    let (vars, loss) = model(DType::F32);
    let x = Tensor::ones((4, 3), DType::F32, CPU).unwrap();
    assert_ne!(values(&loss(&x)), [0.0]);
    let before = read_views(&Variables(&vars));
    let refuse = &mut |view: posthoc_ema::TensorViewMut<'_>| Err(Error::Internal(view.name.to_owned()));
    let refused = Variables(&vars).for_each_mut(refuse).unwrap_err();
    assert!(matches!(refused, Error::Internal(name) if name == "first.bias"));
    let clear = &mut |view: posthoc_ema::TensorViewMut<'_>| {
        view.into_host_bytes().unwrap().fill(0);
        Ok(())
    };
    Variables(&vars).for_each_mut(clear).unwrap();
    assert_eq!(values(&loss(&x)), [0.0]);
    assert!(read_views(&Variables(&vars)).iter().zip(&before).all(|(after, before)| after.3 == before.3));
}

/// Computes the average of a trajectory by its definition, in f64.
fn naive_average(trajectory: &[(u64, Vec<f32>)], profile: &Profile) -> Vec<f64> {
    let last = trajectory.last().unwrap().0 as f64;
    let mut average = vec![0.0; trajectory[0].1.len()];
    let mut share = 0.0;
    for (time, values) in trajectory {
        let next = profile.cumulative(*time as f64, last);
        average.iter_mut().zip(values).for_each(|(a, &v)| *a += (next - share) * f64::from(v));
        share = next;
    }
    average
}

#[test]
fn tracked_map_equals_the_naive_average_and_switches_to_it() {
    let temp = tempfile::tempdir().unwrap();
    let (vars, loss) = model(DType::F32);
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.01).unwrap();
    let options = PostHocEma::options(temp.path().join("ema")).sigma_rels([0.1, 0.25]);
    let mut ema = options.update_every(3).checkpoint_every(30).create(&Variables(&vars)).unwrap();
    let mut trajectory = Vec::new();
    for step in 1..=300u64 {
        let x = Tensor::randn(0f32, 1.0, (8, 3), CPU).unwrap();
        optimizer.backward_step(&loss(&x)).unwrap();
        ema.update(&Variables(&vars)).unwrap();
        if step % 3 == 0 {
            trajectory.push((step, read_views(&Variables(&vars)).iter().flat_map(|view| floats(&view.4)).collect()));
        }
    }
    for profile in ema.profiles().to_vec() {
        let got = ema.synthesize(profile.clone()).unwrap();
        let got: Vec<f32> = got.iter().flat_map(|(_, tensor)| tensor.to_vec::<f32>().unwrap()).collect();
        for (got, exact) in got.iter().zip(naive_average(&trajectory, &profile)) {
            assert!((f64::from(*got) - exact).abs() < 2e-7, "{profile}: {got} {exact}");
        }
    }

    let wanted = Profile::sigma_rel(0.15).unwrap();
    let average = ema.synthesize(wanted.clone()).unwrap();
    ema.switch_to(wanted.clone(), &mut Variables(&vars)).unwrap();
    for (name, tensor) in average.iter() {
        assert_eq!(values(&var(&vars, name)), tensor.to_vec::<f32>().unwrap(), "{name}");
    }
    // Training continues from the written values.
    optimizer.backward_step(&loss(&Tensor::ones((8, 3), DType::F32, CPU).unwrap())).unwrap();
    assert_ne!(values(&var(&vars, "second.bias")), average.get("second.bias").unwrap().to_vec::<f32>().unwrap());

    ema.finish().unwrap();
    let run = Run::open(temp.path().join("ema")).unwrap();
    let plan = run.plan(wanted, posthoc_ema::At::Latest).unwrap();
    run.write(&plan, temp.path().join("average.safetensors")).unwrap();
    let loaded = candle_core::safetensors::load(temp.path().join("average.safetensors"), CPU).unwrap();
    for (name, tensor) in average.iter() {
        let pairs = values(&loaded[name]).into_iter().zip(tensor.to_vec::<f32>().unwrap());
        assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
    }
}

/// Goes back to a checkpoint of the training, and ends with the bits of one that did not.
#[test]
fn training_that_goes_back_keeps_every_bit() {
    let temp = tempfile::tempdir().unwrap();
    let (mut vars, loss) = model(DType::F32);
    let checkpoint = |step: u64| temp.path().join(format!("checkpoint-{step}"));
    let options = || PostHocEma::options(temp.path().join("ema")).update_every(2).checkpoint_every(10);
    let train = |ema: &mut PostHocEma, vars: &VarMap, until: u64| {
        let mut optimizer = candle_nn::SGD::new(vars.all_vars(), 0.1).unwrap();
        while ema.step() < until {
            let x = Tensor::full(ema.step() as f32 * 0.1, (4, 3), CPU).unwrap();
            optimizer.backward_step(&loss(&x)).unwrap();
            ema.update(&Variables(vars)).unwrap();
            if ema.step().is_multiple_of(6) {
                let folder = checkpoint(ema.step());
                std::fs::create_dir_all(&folder).unwrap();
                vars.save(folder.join("model.safetensors")).unwrap();
                ema.save_to(&folder).unwrap();
            }
        }
        ema.synthesize(Profile::sigma_rel(0.15).unwrap()).unwrap()
    };
    let mut ema = options().create(&Variables(&vars)).unwrap();
    let expected = train(&mut ema, &vars, 45);
    drop(ema);
    for from in [30, 12, 36] {
        vars.load(checkpoint(from).join("model.safetensors")).unwrap();
        let mut ema = options().resume_from(checkpoint(from), &Variables(&vars)).unwrap();
        ema.check_step(from).unwrap();
        assert_eq!(train(&mut ema, &vars, 45), expected, "from step {from}");
    }
}

#[test]
fn f64_and_bf16_models_are_tracked_and_switched_in_their_dtype() {
    for dtype in [DType::F64, DType::BF16] {
        let temp = tempfile::tempdir().unwrap();
        let (vars, loss) = model(dtype);
        put(&vars, "steps", Var::from_tensor(&Tensor::new(&[7i64], CPU).unwrap()).unwrap());
        let trained = ["first.bias", "first.weight", "second.bias", "second.weight"].map(|name| var(&vars, name));
        let mut optimizer = AdamW::new_lr(trained.to_vec(), 0.01).unwrap();
        let options = PostHocEma::options(temp.path().join("ema")).betas([0.9]).update_every(1);
        let mut ema = options.create(&Variables(&vars)).unwrap();
        let mut expected: Option<Vec<f64>> = None;
        for _ in 0..50 {
            optimizer.backward_step(&loss(&Tensor::ones((4, 3), dtype, CPU).unwrap())).unwrap();
            ema.update(&Variables(&vars)).unwrap();
            let now: Vec<f64> = to_f64(&trained);
            expected = Some(match expected {
                None => now,
                Some(average) => average.iter().zip(now).map(|(a, n)| 0.9 * a + 0.1 * n).collect(),
            });
        }
        ema.switch_to(Profile::beta(0.9).unwrap(), &mut Variables(&vars)).unwrap();
        let tolerance = if dtype == DType::F64 { 1e-6 } else { 1.0 / 256.0 };
        for (got, exact) in to_f64(&trained).iter().zip(expected.unwrap()) {
            assert!((got - exact).abs() <= tolerance * exact.abs().max(0.1), "{dtype:?}: {got} {exact}");
        }
        assert_eq!(var(&vars, "steps").to_vec1::<i64>().unwrap(), [7]);
    }
}

/// Returns the elements of all variables in f64.
fn to_f64(vars: &[Var]) -> Vec<f64> {
    let values =
        |var: &Var| -> Vec<f64> { var.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap() };
    vars.iter().flat_map(values).collect()
}
