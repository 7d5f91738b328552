//! Tests of synthesis on a device, compared with the CPU's byte by byte.

use std::path::{Path, PathBuf};

use posthoc_ema::{
    At, Checkpoints, Device, Dtype, Error, Output, Parameters, ParametersMut, PostHocEma, Profile, Result, Run,
    Tensors, WriteOptions,
};

use crate::driver::{Driver, count, driver};
use crate::model::Model;
use crate::owner::Owner;

/// Writes a run with several snapshots of a model of mixed dtypes.
fn train(dir: &Path, dtype: Option<Dtype>) -> Tensors {
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let mut ema = PostHocEma::options(dir)
        .update_every(1)
        .checkpoint_every(4)
        .snapshot_growth(None)
        .checkpoint_dtype(dtype)
        .create(&model.host)
        .unwrap();
    for step in 1..=40 {
        model.train(step);
        ema.update(&model.host).unwrap();
    }
    ema.finish().unwrap();
    model.host
}

fn profiles(n: usize) -> Vec<Profile> {
    (0..n).map(|i| Profile::sigma_rel(0.06 + 0.2 * i as f64 / n as f64).unwrap()).collect()
}

/// Synthesizes targets on a device, and returns the device used and the bytes of the files.
fn write(run: &Run, targets: usize, dtype: Option<Dtype>, device: Device, dir: &Path) -> (Device, Vec<Vec<u8>>) {
    std::fs::create_dir_all(dir).unwrap();
    let plans = run.plans(&profiles(targets), At::Latest).unwrap();
    let paths: Vec<PathBuf> = (0..targets).map(|i| dir.join(format!("{i}.safetensors"))).collect();
    let outputs: Vec<Output<'_>> = plans.iter().zip(&paths).map(|(plan, path)| Output { plan, path }).collect();
    let read = std::sync::atomic::AtomicU64::new(0);
    let progress = |bytes| {
        read.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    };
    let used = run.write_all(&outputs, &WriteOptions { dtype, device, progress: Some(&progress) }).unwrap();
    assert_eq!(read.into_inner(), run.bytes_to_read(&plans));
    (used, paths.iter().map(|path| std::fs::read(path).unwrap()).collect())
}

#[test]
fn synthesis_on_device_writes_files_of_cpu() {
    driver();
    for stored in [None, Some(Dtype::F16), Some(Dtype::BF16), Some(Dtype::F64)] {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("run");
        train(&dir, stored);
        let run = Run::open(&dir).unwrap();
        for targets in [1, 2, 11] {
            for dtype in [None, Some(Dtype::F32), Some(Dtype::BF16)] {
                let (used, got) = write(&run, targets, dtype, Device::Cuda(0), &temp.path().join("cuda"));
                let (_, expected) = write(&run, targets, dtype, Device::Cpu, &temp.path().join("cpu"));
                assert_eq!(used, Device::Cuda(0));
                assert!(got == expected, "{stored:?} into {targets} of {dtype:?}");
            }
        }
    }
}

/// Synthesizes more blocks than the three that run at the same time.
#[test]
fn synthesis_of_many_blocks_writes_files_of_cpu() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let mut model = vec![("large", vec![1.0f32; 4_000_001]), ("small", vec![2.0f32; 5])];
    let mut ema = PostHocEma::options(&dir).update_every(1).checkpoint_every(1).create(&model).unwrap();
    for step in 0..8 {
        model.iter_mut().for_each(|(_, v)| v.iter_mut().enumerate().for_each(|(i, v)| *v += (i % 97 * step) as f32));
        ema.update(&model).unwrap();
    }
    ema.flush().unwrap();
    let run = Run::open(&dir).unwrap();
    let (_, got) = write(&run, 1, None, Device::Cuda(0), &temp.path().join("cuda"));
    let (_, expected) = write(&run, 1, None, Device::Cpu, &temp.path().join("cpu"));
    assert!(got == expected);
}

#[test]
fn auto_device_runs_small_job_on_cpu() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&dir, None);
    let run = Run::open(&dir).unwrap();
    assert_eq!(write(&run, 1, None, Device::Auto, &temp.path().join("out")).0, Device::Cpu);
}

#[test]
fn overflow_leaves_no_file() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let mut model = vec![("w", vec![1.0f32; 100])];
    let mut ema = PostHocEma::options(&dir).update_every(1).checkpoint_every(1).create(&model).unwrap();
    for step in 1..=5 {
        model[0].1[77] = 1e5 * step as f32;
        ema.update(&model).unwrap();
    }
    ema.flush().unwrap();
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::sigma_rel(0.1).unwrap(), At::Latest).unwrap();
    let path = temp.path().join("out.safetensors");
    let text = |device| {
        let options = WriteOptions { dtype: Some(Dtype::F16), device, progress: None };
        run.write_all(&[Output { plan: &plan, path: &path }], &options).unwrap_err().to_string()
    };
    assert_eq!(text(Device::Cuda(0)), text(Device::Cpu));
    assert!(text(Device::Cuda(0)).contains("element 77, beyond F16"), "{}", text(Device::Cuda(0)));
    assert!(!path.exists());
    let text = run.write_all(
        &[Output { plan: &plan, path: &path }],
        &WriteOptions { device: Device::Cuda(99), ..Default::default() },
    );
    assert!(text.unwrap_err().to_string().contains("cuda:99: cannot use the device"));
}

/// Elements that are infinite in all checkpoints are left to the CPU.
#[test]
fn infinities_of_a_mask_stay() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let paths = [1, 2].map(|step| temp.path().join(format!("step_{step}.safetensors")));
    for (step, path) in (1u8..).zip(&paths) {
        let bytes = [f32::NEG_INFINITY, f32::from(step), f32::INFINITY].map(f32::to_le_bytes).concat();
        let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![3], &bytes).unwrap();
        std::fs::write(path, safetensors::serialize([("mask", view)], None).unwrap()).unwrap();
    }
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    let merge = checkpoints.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap();
    let written = |name: &str, device| {
        let path = temp.path().join("out").join(name);
        let options = WriteOptions { device, ..Default::default() };
        let used = checkpoints.write(&[(&merge, &path)], &options).unwrap();
        (used, std::fs::read(path).unwrap())
    };
    assert_eq!(written("device.safetensors", Device::Cuda(0)), written("host.safetensors", Device::Cpu));
}

/// Trains two trackers of the same model, one of parameters on a device, and calls `act` with both.
fn with_both(device: Device, mut act: impl FnMut(&PostHocEma, &PostHocEma, &mut Model<'_>)) {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let options = |dir: &str| {
        PostHocEma::options(temp.path().join(dir)).update_every(1).checkpoint_every(5).snapshot_growth(None)
    };
    let mut on_host = options("host").create(&model.host).unwrap();
    let mut on_device = options("device").device(device).create(&model.device).unwrap();
    for step in 1..=23 {
        model.train(step);
        on_host.update(&model.host).unwrap();
        on_device.update(&model.device).unwrap();
        // Waits until files written in the background exist.
        on_device.save().unwrap();
    }
    act(&on_host, &on_device, &mut model);
}

#[test]
fn live_averages_join_synthesis_on_either_side() {
    for device in [Device::Cuda(0), Device::Cpu] {
        with_both(device, |on_host, on_device, _| {
            for profile in profiles(3) {
                assert_eq!(
                    on_device.plan(profile.clone()).unwrap().weights,
                    on_host.plan(profile.clone()).unwrap().weights
                );
                assert!(on_device.synthesize(profile.clone()).unwrap() == on_host.synthesize(profile).unwrap());
            }
        });
    }
}

#[test]
fn switch_to_average_changes_model_in_place() {
    for device in [Device::Cuda(0), Device::Cpu] {
        with_both(device, |on_host, on_device, model| {
            let profile = profiles(1).remove(0);
            on_host.switch_to(profile.clone(), &mut model.host).unwrap();
            on_device.switch_to(profile.clone(), &mut model.device).unwrap();
            assert!(model.on_device() == model.host);
            // The model is in host memory, the averages on either side.
            let mut copy = model.host.clone();
            copy.for_each_mut(&mut |view| {
                let dtype = view.dtype;
                view.into_host_bytes().unwrap().iter_mut().filter(|_| dtype == Dtype::F32).for_each(|b| *b = 0);
                Ok(())
            })
            .unwrap();
            on_device.switch_to(profile, &mut copy).unwrap();
            assert!(copy == model.host);
        });
    }
}

#[test]
fn restore_after_swap_in_keeps_bits() {
    for device in [Device::Cuda(0), Device::Cpu] {
        with_both(device, |on_host, on_device, model| {
            // Bits that arithmetic would not preserve.
            let (_, tensor, owned) = &mut model.device.tensors[0];
            tensor.bytes[4..8].copy_from_slice(&0xffc1_2345u32.to_le_bytes());
            tensor.bytes[8..12].copy_from_slice(&(-0.0f32).to_le_bytes());
            owned.set(&tensor.bytes);
            let before = model.on_device();
            let profile = profiles(1).remove(0);
            let average = on_host.synthesize(profile.clone()).unwrap();
            let averaged = on_device.swap_in(profile.clone(), &mut model.device).unwrap();
            check_averaged(&averaged, &average);
            averaged.restore().unwrap();
            assert!(model.on_device() == before);
            // After a panic.
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let _averaged = on_device.swap_in(profile.clone(), &mut model.device).unwrap();
                panic!("an evaluation that fails");
            }));
            assert!(panicked.is_err() && model.on_device() == before);
        });
    }
}

/// Compares the tensors on the device with an average.
fn check_averaged(params: &crate::model::OnDevice<'_>, average: &Tensors) {
    for (name, tensor, owned) in &params.tensors {
        let expected =
            if posthoc_ema::is_averaged(tensor.dtype) { &average.get(name).unwrap().bytes } else { &tensor.bytes };
        assert!(owned.get() == *expected, "{name}");
    }
}

#[test]
fn overflowing_average_leaves_model_unchanged() {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let mut host = model.host.clone();
    // The run has f32 averages of a tensor that is f16 on the device.
    let mut large = host.get("d.half").unwrap().clone();
    (large.dtype, large.bytes) = (Dtype::F32, (0..130).flat_map(|i| (1e4f32 * i as f32).to_le_bytes()).collect());
    host.insert("d.half", large);
    let mut ema = PostHocEma::options(temp.path()).update_every(1).checkpoint_every(1).create(&host).unwrap();
    (0..3).for_each(|_| assert_eq!(ema.update(&host).unwrap(), posthoc_ema::UpdateOutcome::Stored));
    ema.flush().unwrap();
    let run = Run::open(temp.path()).unwrap();
    let plan = run.plan(Profile::sigma_rel(0.1).unwrap(), At::Latest).unwrap();
    let before = model.on_device();
    let error = run.swap_in(&plan, &mut model.device).unwrap_err();
    assert!(matches!(&error, Error::Tensor { tensor, .. } if tensor == "d.half"), "{error}");
    assert!(model.on_device() == before);
    let error = ema.switch_to(Profile::sigma_rel(0.1).unwrap(), &mut model.device).unwrap_err();
    assert!(error.to_string().contains("element 7, beyond F16"), "{error}");
    assert!(model.on_device() == before);
}

/// Counts the launches for many small tensors, in its own process.
#[test]
#[ignore = "run by `small_tensors_are_blended_in_one_launch`"]
fn small_tensors() {
    let owner = Owner::new();
    let tensor = |i: usize| {
        let tensor = posthoc_ema::Tensor::new(&[3 + i % 5], &vec![i as f32; 3 + i % 5]).unwrap();
        let owned = owner.own(&tensor.bytes, 0);
        (format!("{i:03}"), tensor, owned)
    };
    let model = crate::model::OnDevice { tensors: (0..100).map(tensor).collect(), until_fence: false };
    let temp = tempfile::tempdir().unwrap();
    let options = PostHocEma::options(temp.path()).sigma_rels([0.2]).update_every(1).device(Device::Cuda(0));
    let mut ema = options.create(&model).unwrap();
    ema.update(&model).unwrap();
    let mut outputs: Vec<Vec<u8>> = model.tensors.iter().map(|(_, tensor, _)| vec![9; tensor.bytes.len()]).collect();
    let mut views = Vec::new();
    for ((name, tensor, _), bytes) in model.tensors.iter().zip(&mut outputs) {
        views.push(posthoc_ema::TensorViewMut::host(name, tensor.dtype, &tensor.shape, bytes).unwrap());
    }
    let launches = count("launches").unwrap();
    ema.load_tracked_into(0, views).unwrap();
    assert_eq!(count("launches").unwrap(), launches + 1);
    for ((name, tensor, _), bytes) in model.tensors.iter().zip(&outputs) {
        assert!(*bytes == tensor.bytes, "{name}");
    }
}

#[test]
fn small_tensors_are_blended_in_one_launch() {
    crate::driver::check_in_own_process("synthesis::small_tensors", &[]);
}

/// Measures the memory that an evaluation takes in addition to the model.
#[test]
#[ignore = "run by `evaluation_needs_no_memory_for_second_model`"]
fn evaluation() {
    let Driver::StandIn(_) = driver() else { return };
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let bytes = vec![0x3fu8; 400_000_000];
    let memory = owner.own(&bytes, 0);
    struct Large<'o>(crate::owner::Owned<'o>);
    const SHAPE: [usize; 1] = [100_000_000];
    impl Parameters for Large<'_> {
        fn with_tensors(&self, read: &mut dyn FnMut(&[posthoc_ema::TensorView<'_>]) -> Result<()>) -> Result<()> {
            read(&[posthoc_ema::TensorView::cuda("w", Dtype::F32, &SHAPE, self.0.lend())?])
        }
    }
    impl ParametersMut for Large<'_> {
        fn for_each_mut(&mut self, write: &mut dyn FnMut(posthoc_ema::TensorViewMut<'_>) -> Result<()>) -> Result<()> {
            write(posthoc_ema::TensorViewMut::cuda("w", Dtype::F32, &SHAPE, self.0.lend_mut())?)
        }
    }
    let mut model = Large(memory);
    let options = PostHocEma::options(temp.path()).sigma_rels([0.2]).update_every(1).checkpoint_every(1);
    let mut ema = options.checkpoint_dtype(Dtype::F16).create(&model).unwrap();
    ema.update(&model).unwrap();
    ema.finish().unwrap();
    let before = count("device_bytes").unwrap();
    let averaged = ema.swap_in(Profile::sigma_rel(0.2).unwrap(), &mut model).unwrap();
    averaged.restore().unwrap();
    let peak = count("peak_device_bytes").unwrap() - before;
    assert!(peak < 300_000_000, "{peak} bytes in addition to the model's 400 MB");
    assert!(
        count("peak_pinned_bytes").unwrap() < 2 * 400_000_000 + 300_000_000,
        "the offload's two slots, and some blocks"
    );
    assert!(model.0.get() == bytes);
}

#[test]
fn evaluation_needs_no_memory_for_second_model() {
    crate::driver::check_in_own_process("synthesis::evaluation", &[]);
}
