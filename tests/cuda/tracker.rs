//! Tests of the tracker with parameters on a device, compared with a tracker of parameters in host memory.

use cudarc::driver::sys::CUstreamCaptureMode;
use posthoc_ema::compute::cuda::devices;
use posthoc_ema::{Device, Dtype, Error, OnNonFinite, Options, PostHocEma, Precision, Profile, Tensors, UpdateOutcome};

use crate::driver::{count, driver};
use crate::model::{Model, files};
use crate::owner::Owner;

fn options(dir: &std::path::Path) -> Options {
    let options = PostHocEma::options(dir).update_every(2).checkpoint_every(10).snapshot_growth(None);
    options.max_checkpoints(3).checkpoint_dtype(Dtype::F16)
}

/// Trains the same model on both sides and compares every file.
fn check(device: Device, set: impl Fn(Options) -> Options, until_fence: bool) {
    let temp = tempfile::tempdir().unwrap();
    let on_host = temp.path().join("host");
    let on_device = temp.path().join("device");
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    model.device.until_fence = until_fence;
    let mut expected = set(options(&on_host)).create(&model.host).unwrap();
    let mut got = set(options(&on_device)).device(device).create(&model.device).unwrap();
    for step in 1..=47 {
        if let Some(fence) = got.fence() {
            // SAFETY: the owner's stream, in the primary context.
            unsafe { fence.wait_on(owner.stream()) }.unwrap();
        }
        model.train(step);
        let want = expected.update(&model.host).unwrap();
        assert_eq!(got.update(&model.device).unwrap(), want);
        if step == 25 {
            got.save().unwrap();
        }
    }
    expected.finish().unwrap();
    got.finish().unwrap();
    assert_eq!(files(&on_device), files(&on_host));
    assert!(files(&on_device).len() > 3 * got.profiles().len());
    drop(got);
    drop(expected);

    // Resumes with the averages on the other side.
    let other = if device == Device::Cpu { Device::Cuda(0) } else { Device::Cpu };
    let mut expected = set(options(&on_host)).resume(&model.host).unwrap();
    let mut got = set(options(&on_device)).device(other).resume(&model.device).unwrap();
    assert_eq!(got.step(), 47);
    for step in 48..=63 {
        if let Some(fence) = got.fence() {
            fence.wait().unwrap();
        }
        model.train(step);
        assert_eq!(got.update(&model.device).unwrap(), expected.update(&model.host).unwrap());
    }
    expected.finish().unwrap();
    got.finish().unwrap();
    assert_eq!(files(&on_device), files(&on_host));
}

#[test]
fn checkpoint_without_background_writes_files_before_returning() {
    driver();
    for device in [Device::Cuda(0), Device::Cpu] {
        check(device, |options| options.checkpoint_in_background(false), false);
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let options = options(temp.path()).checkpoint_in_background(false).device(device);
        let mut ema = options.create(&model.device).unwrap();
        for step in 1..=20 {
            model.train(step);
            let stored = ema.update(&model.device).unwrap() == UpdateOutcome::Stored;
            assert_eq!(stored, step % 10 == 0);
            let there = temp.path().join(format!("1.{step}.safetensors")).is_file();
            assert_eq!(there, stored, "{device:?} {step}");
        }
    }
}

#[test]
fn averages_on_device_store_files_of_host() {
    check(Device::Cuda(0), |options| options, false);
}

#[test]
fn averages_on_host_store_files_of_host() {
    check(Device::Cpu, |options| options, false);
}

#[test]
fn parameters_lent_until_fence_store_files_of_host() {
    check(Device::Cpu, |options| options, true);
    check(Device::Cpu, |options| options.device_copy(true), true);
}

#[test]
fn copy_within_the_device_stores_files_of_host() {
    check(Device::Cpu, |options| options.device_copy(true), false);
    check(Device::Cpu, |options| options.device_copy(false), false);
}

#[test]
fn every_precision_dtype_and_option_stores_files_of_host() {
    for device in [Device::Cuda(0), Device::Cpu] {
        check(device, |options| options.precision(Precision::Plain).checkpoint_dtype(None), false);
        let many = |options: Options| options.betas([0.5, 0.8, 0.9, 0.95, 0.99]).sigma_rels([0.05, 0.1, 0.2, 0.28]);
        check(device, |options| many(options).checkpoint_dtype(Dtype::F64), false);
        check(device, |options| options.checkpoint_dtype(Dtype::BF16).shard_size(3000), false);
        check(device, |options| options.copy(["d.half"]).leave_out(["a.*"]), false);
    }
}

#[test]
fn extended_run_stores_files_and_gives_averages_of_host() {
    driver();
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let on_host = temp.path().join("host");
        let on_device = temp.path().join("device");
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let mut expected = options(&on_host).leave_out(["a.*"]).copy(["d.half"]).create(&model.host).unwrap();
        let few = options(&on_device).leave_out(["a.*"]).copy(["d.half"]).device(device);
        let mut got = few.create(&model.device).unwrap();
        let train = |model: &mut Model, expected: &mut PostHocEma, got: &mut PostHocEma, until: u64| {
            while got.step() < until {
                got.fence().map_or(Ok(()), |fence| fence.wait()).unwrap();
                model.train(got.step() + 1);
                assert_eq!(got.update(&model.device).unwrap(), expected.update(&model.host).unwrap());
            }
            expected.finish().unwrap();
            got.finish().unwrap();
        };
        train(&mut model, &mut expected, &mut got, 25);
        drop((expected, got));
        let all = |dir| options(dir).extend(true).leave_out(Vec::<String>::new()).copy(Vec::<String>::new());
        let mut expected = all(&on_host).resume(&model.host).unwrap();
        let mut got = all(&on_device).device(device).resume(&model.device).unwrap();
        train(&mut model, &mut expected, &mut got, 47);
        assert_eq!(files(&on_device), files(&on_host));
        let profile = Profile::sigma_rel(0.15).unwrap();
        let plan = got.plan(profile.clone()).unwrap();
        assert!(plan.later.iter().any(|later| later.since == 24), "{:?}", plan.later);
        assert_eq!(got.synthesize(profile.clone()).unwrap(), expected.synthesize(profile).unwrap());
    }
}

/// Goes back to checkpoints of the training, with the averages on either side.
#[test]
fn rewinds_store_files_of_an_undisturbed_host() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let straight = temp.path().join("straight");
    let mut expected = options(&straight).max_checkpoints(30).create(&model.host).unwrap();
    for step in 1..=47 {
        // The mask depends on the step alone here.
        set(&mut model, step);
        expected.update(&model.host).unwrap();
    }
    expected.finish().unwrap();
    for device in [Device::Cuda(0), Device::Cpu] {
        let dir = temp.path().join(format!("{device:?}"));
        let state = |step: u64| temp.path().join(format!("{device:?}-{step}"));
        let options = |device| options(&dir).max_checkpoints(30).device(device);
        let mut got = options(device).create(&model.device).unwrap();
        for (from, until, side) in [(24, 40, device), (12, 31, Device::Cpu), (24, 47, device), (36, 47, device)] {
            while got.step() < until {
                got.fence().map_or(Ok(()), |fence| fence.wait()).unwrap();
                set(&mut model, got.step() + 1);
                got.update(&model.device).unwrap();
                if got.step().is_multiple_of(6) {
                    got.save_to(state(got.step())).unwrap();
                }
            }
            drop(got);
            got = options(side).resume_from(state(from), &model.device).unwrap();
            got.check_step(from).unwrap();
        }
        while got.step() < 47 {
            got.fence().map_or(Ok(()), |fence| fence.wait()).unwrap();
            set(&mut model, got.step() + 1);
            got.update(&model.device).unwrap();
        }
        got.finish().unwrap();
        assert_eq!(files(&dir), files(&straight), "{device:?}");
        assert!(!dir.join("aside").exists());
        let profile = Profile::sigma_rel(0.15).unwrap();
        assert_eq!(got.synthesize(profile.clone()).unwrap(), expected.synthesize(profile).unwrap());
    }
}

/// Gives the model the values of a step, whatever it held before.
fn set(model: &mut Model, step: u64) {
    for (_, tensor, _) in &mut model.device.tensors {
        if tensor.dtype == Dtype::BOOL {
            tensor.bytes.fill((step % 2) as u8);
        }
    }
    model.train(step);
}

#[test]
fn auto_device_keeps_averages_on_device() {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let model = Model::new(&owner);
    let fence_after_an_update = |device, dir: &str| {
        let mut ema = options(&temp.path().join(dir)).device(device).create(&model.device).unwrap();
        assert_eq!(ema.update_at(2, &model.device).unwrap(), UpdateOutcome::Updated);
        ema.fence().is_some()
    };
    // Averages on the device need no fence.
    assert!(!fence_after_an_update(Device::Auto, "auto"));
    assert!(fence_after_an_update(Device::Cpu, "host"));
}

#[test]
fn value_that_is_not_finite_is_reported_and_not_stored() {
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let ignore = options(temp.path()).on_non_finite(OnNonFinite::Ignore);
        let mut ema = ignore.device(device).create(&model.device).unwrap();
        for step in 1..10 {
            model.train(step);
            ema.update(&model.device).unwrap();
        }
        let (_, tensor, owned) = &mut model.device.tensors[1];
        tensor.bytes[2002..2004].copy_from_slice(&[0xc0, 0x7f]);
        owned.set(&tensor.bytes);
        assert_eq!(ema.update(&model.device).unwrap(), UpdateOutcome::Stored);
        let error = ema.finish().unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::NonFinite { element: 1001, step: 10, .. }), "{text}");
        assert!(text.contains("b.weight"), "{text}");
        assert!(files(temp.path()).is_empty());
    }
}

#[test]
fn average_beyond_f16_is_stored_in_f32() {
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let mut ema = options(temp.path()).device(device).create(&model.device).unwrap();
        let (_, tensor, owned) = &mut model.device.tensors[0];
        tensor.bytes[..4].copy_from_slice(&1e6f32.to_le_bytes());
        owned.set(&tensor.bytes);
        for _ in 1..=10 {
            ema.update(&model.device).unwrap();
        }
        ema.finish().unwrap();
        let files = files(temp.path());
        let dtype = |name: &str| files[0].1.iter().find(|(n, _)| n == name).unwrap().1.dtype;
        assert_eq!((dtype("a.weight"), dtype("b.weight")), (Dtype::F32, Dtype::F16));
    }
}

#[test]
fn parameters_on_wrong_device_are_rejected() {
    driver();
    if devices().unwrap() < 2 {
        return;
    }
    check_wrong_devices(Device::Cuda(0));
    check_wrong_devices(Device::Cpu);
}

fn check_wrong_devices(device: Device) {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let second = Owner::on(1);
    let mut model = Model::new(&owner);
    let mut elsewhere = Model::new(&second);
    let text = |outcome: posthoc_ema::Result<PostHocEma>| outcome.unwrap_err().to_string();
    let create = |device| options(&temp.path().join("run")).device(device);
    let error = text(create(Device::Cuda(0)).create(&model.host));
    assert!(error.contains("option device") && error.contains("host memory"), "{error}");
    let error = text(create(Device::Cuda(1)).create(&model.device));
    assert!(error.contains("on cuda:0") && error.contains("cuda:1"), "{error}");
    let error = text(create(Device::AnyCuda).create(&model.host));
    assert!(error.contains("averages on cuda need them there"), "{error}");
    // Without a number, it is the device of the parameters.
    let mut beside = create(Device::AnyCuda).create(&elsewhere.device).unwrap();
    beside.update_at(2, &elsewhere.device).unwrap();
    assert!(beside.fence().is_none(), "the averages are on the device");
    beside.finish().unwrap();
    drop(beside);
    std::fs::remove_dir_all(temp.path().join("run")).unwrap();
    // A model that has moved, and one on two devices.
    model.device.tensors.swap_remove(2);
    let mut ema = create(device).create(&model.device).unwrap();
    ema.update_at(2, &model.device).unwrap();
    let host: Tensors = model.host.clone().into_iter().filter(|(name, _)| name != "c.scale").collect();
    let error = ema.update_at(4, &host).unwrap_err().to_string();
    assert!(error.contains("host memory"), "{error}");
    elsewhere.device.tensors.swap_remove(2);
    let error = ema.update_at(5, &elsewhere.device).unwrap_err().to_string();
    let moved = "it is on cuda:1 now, and was on cuda:0 when the run was opened";
    let is_on_host = device == Device::Cpu;
    let other = if is_on_host { moved } else { "cuda:0: cannot read the parameters: they are on cuda:1" };
    assert!(error.contains(other), "{error}");
    let tensor = elsewhere.device.tensors.swap_remove(0);
    model.device.tensors.push(tensor);
    model.device.tensors.swap_remove(0);
    let error = ema.update_at(6, &model.device).unwrap_err().to_string();
    assert!(error.contains(if is_on_host { moved } else { "the model has tensors on cuda:" }), "{error}");
}

/// Runs in its own process, because the counters of the stand-in are global.
#[test]
#[ignore = "run by `update_costs_are_bounded`"]
fn costs() {
    let Some(before) = count("launches") else { return };
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let mut ema = options(temp.path()).device(Device::Cuda(0)).create(&model.device).unwrap();
    let created = count("allocations").unwrap();
    let device_work = || ["launches", "copies", "allocations", "events"].map(|what| count(what).unwrap());
    let launches = || count("launches").unwrap();
    assert_eq!(launches(), before, "no kernel runs before the first update");
    model.train(1);
    let idle = device_work();
    assert_eq!(ema.update(&model.device).unwrap(), UpdateOutcome::Skipped);
    assert_eq!(device_work(), idle, "an update that is not due costs nothing");
    assert_eq!(ema.update(&model.device).unwrap(), UpdateOutcome::Updated);
    model.train(3);
    assert_eq!(ema.update(&model.device).unwrap(), UpdateOutcome::Skipped);
    let idle = device_work();
    assert_eq!(ema.update(&model.device).unwrap(), UpdateOutcome::Updated);
    let [launched, copied, allocated, _] = device_work();
    assert_eq!(launched, idle[0] + 2, "an update is one launch, and its look another");
    assert_eq!((copied, allocated), (idle[1] + 1, idle[2]), "only the result of the look is copied");
    for step in 5..=20 {
        model.train(step);
        ema.update(&model.device).unwrap();
    }
    ema.save().unwrap();
    ema.finish().unwrap();
    assert_eq!(count("allocations").unwrap(), created, "no checkpoint allocates memory of the device");
    drop(ema);

    // With averages on the host, the device holds only small tensors and their table.
    let temp = tempfile::tempdir().unwrap();
    let memory = count("device_bytes").unwrap();
    let mut ema = options(temp.path()).create(&model.device).unwrap();
    let bus = count("d2h_bytes").unwrap();
    let copies = count("copies").unwrap();
    let created = count("allocations").unwrap();
    for step in 21..31 {
        model.train(step);
        ema.update(&model.device).unwrap();
    }
    ema.finish().unwrap();
    let bytes = model.host.iter().map(|(_, tensor)| tensor.bytes.len().next_multiple_of(16) as u64).sum::<u64>();
    assert!(count("device_bytes").unwrap() - memory < bytes + 4096);
    assert_eq!(count("allocations").unwrap(), created);
    assert_eq!(count("d2h_bytes").unwrap() - bus, 5 * bytes, "each tensor crosses the bus once");
    let trained = 10 * 7; // uploads of `train`
    assert_eq!(count("copies").unwrap() - copies - trained, 5 + 1, "one for all small tensors, and one of their table");
    assert_eq!(count("kernel_bus_bytes"), Some(0));
}

#[test]
fn update_costs_are_bounded() {
    crate::driver::check_in_own_process("tracker::costs", &[]);
}

/// Returns the thread's capture mode, and makes it the default.
fn capture_mode() -> CUstreamCaptureMode {
    let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: the driver is loaded, and the pointer is valid for the call.
    unsafe { cudarc::driver::sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result().unwrap();
    mode
}

/// PyTorch depends on the thread's current context and capture mode.
#[test]
fn every_call_keeps_current_context_of_thread() {
    driver();
    let current = || cudarc::driver::result::ctx::get_current().unwrap();
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let other = (devices().unwrap() > 1).then(|| Owner::on(1));
        let mut step = 0;
        let mut check = |what: &str, model: &mut Model<'_>, act: &mut dyn FnMut(&mut Model<'_>)| {
            step += 1;
            model.train(step);
            owner.wait();
            match &other {
                Some(other) => other.make_current(),
                // SAFETY: the null context is that of a thread that has not used CUDA.
                None => unsafe { cudarc::driver::result::ctx::set_current(std::ptr::null_mut()) }.unwrap(),
            }
            let before = current();
            act(model);
            assert_eq!(current(), before, "{what}");
            assert_eq!(capture_mode(), CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL, "{what}");
        };
        let mut ema = None;
        check("create", &mut model, &mut |model| {
            ema = Some(options(temp.path()).device(device).create(&model.device).unwrap());
        });
        let mut ema = ema.unwrap();
        for _ in 0..12 {
            check("update", &mut model, &mut |model| {
                ema.update(&model.device).unwrap();
            });
        }
        check("save", &mut model, &mut |_| ema.save().unwrap());
        let profile = posthoc_ema::Profile::sigma_rel(0.1).unwrap();
        check("swap in", &mut model, &mut |model| {
            ema.swap_in(profile.clone(), &mut model.device).unwrap().restore().unwrap()
        });
        check("finish", &mut model, &mut |_| ema.finish().unwrap());
        let mut ema = Some(ema);
        check("drop", &mut model, &mut |_| drop(ema.take()));
    }
}

#[test]
fn unaligned_tensor_is_rejected() {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let memory = owner.own(&[0; 17], 1);
    struct Unaligned<'o>(crate::owner::Owned<'o>);
    impl posthoc_ema::Parameters for Unaligned<'_> {
        fn with_tensors(
            &self,
            read: &mut dyn FnMut(&[posthoc_ema::TensorView<'_>]) -> posthoc_ema::Result<()>,
        ) -> posthoc_ema::Result<()> {
            // SAFETY: the memory holds four elements of four bytes.
            let lent = unsafe { posthoc_ema::CudaMemory::from_raw(0, self.0.lend().device(), self.0.address(), 16) };
            read(&[posthoc_ema::TensorView::cuda("w", Dtype::F32, &[4], lent)?])
        }
    }
    let error = options(temp.path()).create(&Unaligned(memory)).unwrap_err().to_string();
    assert!(error.contains("`w`") && error.contains("not a multiple of its element size of 4 bytes"), "{error}");
}
