//! Tests of failing drivers and devices: clear errors, and no loss of stored files.

use std::path::Path;

use cudarc::driver::sys::CUstreamCaptureMode;
use posthoc_ema::compute::cuda::{self, KernelCode, Unavailable, devices};
use posthoc_ema::{At, Device, Options, Output, PostHocEma, Profile, Run, WriteOptions};

use crate::capture::beside_capture_of_blocking_stream;
use crate::driver::{check_in_own_process, count, driver, is_standin, run_in_own_process, standin};
use crate::log::logged;
use crate::model::{Model, files};
use crate::owner::Owner;

fn options(dir: &Path) -> Options {
    PostHocEma::options(dir).update_every(1).checkpoint_every(5).snapshot_growth(None)
}

/// Each fault needs its own driver, and therefore its own process.
#[test]
fn every_fault_is_reported() {
    if !is_standin() {
        return;
    }
    check_in_own_process("faults::no_device", &[("STANDIN_DEVICES", "0")]);
    check_in_own_process("faults::stub_of_the_toolkit", &[("STANDIN_INIT", "34")]);
    check_in_own_process("faults::driver_that_does_not_start", &[("STANDIN_INIT", "999")]);
    check_in_own_process("faults::old_driver", &[("STANDIN_DRIVER", "11080")]);
    check_in_own_process("faults::driver_older_than_the_compiler", &[("STANDIN_DRIVER", "12020")]);
    check_in_own_process(
        "faults::no_code_for_the_device",
        &[("STANDIN_REJECT_IMAGE", "1"), ("STANDIN_CAPABILITY", "75")],
    );
    check_in_own_process("faults::too_little_memory", &[("STANDIN_MEMORY", "60000")]);
    check_in_own_process("faults::full_device", &[("STANDIN_MEMORY", "2000000")]);
    check_in_own_process("faults::no_device_memory_at_all", &[("STANDIN_MEMORY", "2000000")]);
    check_in_own_process("faults::too_little_to_pin", &[("STANDIN_PINNED", "15000")]);
    check_in_own_process("faults::failed_synthesis", &[("STANDIN_FAIL_LAUNCH", "1")]);
    for launch in ["1", "3", "12", "20", "40"] {
        check_in_own_process("faults::failed_launch", &[("STANDIN_FAIL_LAUNCH", launch)]);
    }
    for copy in ["30", "45", "50", "70"] {
        check_in_own_process("faults::failed_launch", &[("STANDIN_FAIL_COPY", copy)]);
        check_in_own_process("faults::failed_copy", &[("STANDIN_FAIL_COPY", copy)]);
    }
}

fn reason() -> String {
    driver();
    let text = devices().unwrap_err().to_string();
    let error = cuda::CudaDevice::open(0).unwrap_err().to_string();
    assert!(error.contains("cuda:0: cannot use the device") && error.contains(&text), "{error}");
    text
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn no_device() {
    driver();
    assert_eq!(devices(), Err(Unavailable::NoDevice));
    assert!(reason().contains("CUDA_VISIBLE_DEVICES"));
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn stub_of_the_toolkit() {
    assert!(reason().contains("LD_LIBRARY_PATH"));
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn driver_that_does_not_start() {
    assert!(reason().contains("error 999") && reason().contains("nvidia-smi"));
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn old_driver() {
    let text = reason();
    assert!(text.contains("CUDA 11.8, the kernels need 12.0") && text.contains("update it to version 525"), "{text}");
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn driver_older_than_the_compiler() {
    driver();
    let device = cuda::CudaDevice::open(0).unwrap();
    assert_eq!((device.code(), device.driver().as_str()), (KernelCode::Ptx, "12.2"));
}

/// The stand-in refuses machine code of CUDA 13 for such a driver, and PTX of a version that it does not know.
#[test]
fn drivers_of_cuda_12_run_every_kernel() {
    if !is_standin() {
        return;
    }
    for part in ["update::", "blend::blend_of_mixed_dtypes_has_bits_of_cpu", "offload::"] {
        let output = run_in_own_process(part, &[("STANDIN_DRIVER", "12000")], &standin());
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !text.contains(" 0 passed"), "{text}");
    }
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn no_code_for_the_device() {
    driver();
    let text = cuda::CudaDevice::open(0).unwrap_err().to_string();
    assert!(text.contains("compute capability 7.5") && text.contains("POSTHOC_EMA_CUDA_ARCHS"), "{text}");
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn too_little_memory() {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let model = Model::new(&owner);
    let text = options(temp.path()).device(Device::Cuda(0)).create(&model.device).unwrap_err().to_string();
    assert!(text.contains("running averages") && text.contains("are free") && text.contains("on the host"), "{text}");
    // They fit on the host, which `Auto` chooses.
    let mut ema = options(temp.path()).device(Device::Auto).create(&model.device).unwrap();
    ema.update(&model.device).unwrap();
    assert!(ema.fence().is_some());
    ema.finish().unwrap();
}

/// Trains, stores and evaluates after another library has taken the rest of the device, as PyTorch's cache does.
#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn full_device() {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let create = |name: &str| options(&temp.path().join(name));
    let mut ema = create("device").device(Device::AnyCuda).create(&model.device).unwrap();
    let mut twin = create("host").create(&model.host).unwrap();
    let free = cudarc::driver::result::mem_get_info().unwrap().0;
    let rest = owner.own(&vec![1; free - 60_000], 0);
    for step in 1..=20 {
        model.train(step);
        ema.update(&model.device).unwrap();
        twin.update(&model.host).unwrap();
    }
    let profile = Profile::sigma_rel(0.1).unwrap();
    let average = twin.synthesize(profile.clone()).unwrap();
    let swapped = ema.swap_in(profile, &mut model.device).unwrap();
    for (name, tensor, owned) in &swapped.tensors {
        assert!(owned.get() == average.get(name).unwrap().bytes, "{name} {}", tensor.dtype);
    }
    swapped.restore().unwrap();
    ema.finish().unwrap();
    twin.finish().unwrap();
    assert!(files(&temp.path().join("device")) == files(&temp.path().join("host")));
    drop(rest);
}

/// Evaluates and synthesizes on the CPU if another library has taken all of the device, and says so once for each.
#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn no_device_memory_at_all() {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    for device in [Device::AnyCuda, Device::Cpu] {
        let mut model = Model::new(&owner);
        let dirs = ["device", "host"].map(|name| temp.path().join(format!("{name}-{device}")));
        let mut ema = options(&dirs[0]).device(device).create(&model.device).unwrap();
        let mut twin = options(&dirs[1]).create(&model.host).unwrap();
        for step in 1..=20 {
            model.train(step);
            ema.update(&model.device).unwrap();
            twin.update(&model.host).unwrap();
        }
        ema.flush().unwrap();
        owner.make_current();
        let rest = owner.own(&vec![1; cudarc::driver::result::mem_get_info().unwrap().0 - 1], 0);
        let profile = Profile::sigma_rel(0.1).unwrap();
        let average = twin.synthesize(profile.clone()).unwrap();
        let once = |act: &mut dyn FnMut()| {
            let lines = logged(act);
            let of_host = lines.iter().filter(|line| line.contains("the CPU blends"));
            assert_eq!(of_host.count(), 1, "{lines:?}");
        };
        once(&mut || {
            let swapped = ema.swap_in(profile.clone(), &mut model.device).unwrap();
            for (name, tensor, owned) in &swapped.tensors {
                assert!(owned.get() == average.get(name).unwrap().bytes, "{name} {}", tensor.dtype);
            }
            swapped.restore().unwrap();
        });
        if device == Device::AnyCuda {
            let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            let synthesize = || assert!(ema.synthesize(profile.clone()).unwrap() == average);
            once(&mut || beside_capture_of_blocking_stream(mode, synthesize));
        }
        let run = Run::open(&dirs[0]).unwrap();
        let plan = run.plan(profile.clone(), At::Latest).unwrap();
        let write = |device, name: &str| {
            let path = temp.path().join(name);
            let options = WriteOptions { device, ..WriteOptions::default() };
            run.write_all(&[Output { plan: &plan, path: &path }], &options).unwrap();
            std::fs::read(path).unwrap()
        };
        once(&mut || assert!(write(Device::Cuda(0), "cuda.safetensors") == write(Device::Cpu, "cpu.safetensors")));
        drop(rest);
        ema.finish().unwrap();
        twin.finish().unwrap();
        assert!(files(&dirs[0]) == files(&dirs[1]));
    }
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn too_little_to_pin() {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let model = Model::new(&owner);
    let text = options(temp.path()).create(&model.device).unwrap_err().to_string();
    assert!(text.contains("lock") && text.contains("host's memory") && !text.contains("device's memory"), "{text}");
}

/// Trains until the device fails, and checks that the stored files are intact and that training resumes on the host.
fn until_failure(device: Device) {
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    // Stores every step, because the last step of the failed run depends on the fault.
    let reference = options(&temp.path().join("reference")).checkpoint_every(1).max_checkpoints(100);
    let mut reference = reference.create(&model.host).unwrap();
    let dir = temp.path().join("run");
    let mut failed = None;
    match options(&dir).device(device).create(&model.device) {
        Err(error) => failed = Some(error.to_string()),
        Ok(mut ema) => {
            for step in 1..=40 {
                model.train_host(step);
                reference.update(&model.host).unwrap();
                let mut updated = || ema.update(&model.device).map(drop).map_err(|error| error.to_string());
                failed = model.try_train_device().and_then(|()| updated()).err();
                if failed.is_some() {
                    break;
                }
            }
            let last = ema.finish().and_then(|()| ema.finish());
            failed = failed.or(last.err().map(|error| error.to_string()));
        }
    }
    let text = failed.expect("the fault occurs");
    assert!(text.contains("cuda:0") || text.contains("lost") || text.contains("CUDA_ERROR"), "{text}");
    // Every file is intact and equals that of an undisturbed run at the same step.
    if !dir.join("state.safetensors").exists() {
        return;
    }
    drop(reference);
    let stored = files(&dir);
    let expected = files(&temp.path().join("reference"));
    for (name, tensors, metadata) in stored.iter().filter(|(name, ..)| name != "state.safetensors") {
        let (_, same, also) = expected.iter().find(|(other, ..)| other == name).unwrap();
        assert!(tensors == same && metadata == also, "{name}");
    }
    let resumed = options(&dir).resume(&model.host).unwrap();
    assert!(resumed.step() > 0);
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn failed_launch() {
    until_failure(Device::Cuda(0));
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn failed_copy() {
    until_failure(Device::Cpu);
}

#[test]
#[ignore = "run by `every_fault_is_reported`"]
fn failed_synthesis() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let model = vec![("w", vec![1.0f32; 1000])];
    let mut ema = options(&dir).create(&model).unwrap();
    for _ in 0..20 {
        ema.update(&model).unwrap();
    }
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::sigma_rel(0.1).unwrap(), At::Latest).unwrap();
    let path = temp.path().join("out.safetensors");
    let options = |device| WriteOptions { device, ..WriteOptions::default() };
    let output = [Output { plan: &plan, path: &path }];
    let text = run.write_all(&output, &options(Device::Cuda(0))).unwrap_err().to_string();
    assert!(text.contains("launch the blend") && text.contains("(700)"), "{text}");
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1, "nothing but the run");
    // The CPU still works.
    assert_eq!(run.write_all(&output, &options(Device::Cpu)).unwrap(), Device::Cpu);
    assert!(count("launches").unwrap() > 0);
}
