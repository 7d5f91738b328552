//! Memory that is freed right after work on it was queued. NVIDIA does not promise that a free waits for work, and the
//! stand-in's does not: it breaks the device, so each case runs in its own process.

use posthoc_ema::compute::cpu::{Layout, Precision, UpdateWeights};
use posthoc_ema::compute::cuda::{
    BlendInput, BlendPart, Blender, CudaDevice, Destination, DeviceAverages, Offload, devices,
};
use posthoc_ema::{Device, Dtype, Error, PostHocEma};

use crate::driver::{check_in_own_process, driver};
use crate::model::Model;
use crate::owner::Owner;

/// Checks that the device has not failed.
fn check_device(owner: &Owner) {
    let owned = owner.own(&[7; 100], 0);
    assert_eq!(owned.get(), [7; 100]);
}

#[test]
#[ignore = "run by `no_memory_is_freed_under_pending_work`"]
fn averages() {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    let layout = Layout::new([3000]);
    let owned = owner.own(&[1; 12_000], 0);
    let copied = owner.own(&[1; 9], 0);
    for looks in [false, true] {
        let mut averages = DeviceAverages::zeros(&device, &layout, 9, Precision::Compensated, &[9]).unwrap();
        let lent = [(Dtype::F32, owned.lend())];
        averages.update(&lent, &[copied.lend()], UpdateWeights::at(1, &[1.0; 9])).unwrap();
        if looks {
            averages.look(&lent, &[copied.lend()]).unwrap();
        }
        drop(averages);
    }
    check_device(&owner);
}

#[test]
#[ignore = "run by `no_memory_is_freed_under_pending_work`"]
fn copies_to_host() {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    let owned = owner.own(&[1; 5000], 0);
    for (is_offload_first, copies_on_device) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut offload = Offload::new(&device, &[5000], copies_on_device).unwrap();
        let (pending, fence) = offload.copy(&[owned.lend()]).unwrap();
        match is_offload_first {
            true => drop((offload, pending)),
            false => drop((pending, offload)),
        }
        drop(fence);
    }
    check_device(&owner);
}

#[test]
#[ignore = "run by `no_memory_is_freed_under_pending_work`"]
fn blends() {
    let owner = Owner::new();
    let source = vec![1u8; 4000];
    let target = owner.own(&[0; 4000], 0);
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    let sources = vec![BlendInput::Host(&source)];
    let part = BlendPart { sources, dtypes: vec![Dtype::F32], output: Dtype::F32, elements: 1000 };
    let report = |_, _| Error::NoUpdate;
    let on_host = Destination::Host(Box::new(|_| panic!("a block that is dropped is delivered")));
    blender.submit(vec![part.clone()], &[0.5], 1, on_host, Box::new(report)).unwrap();
    let on_device = Destination::Device(vec![target.lend_mut()]);
    blender.submit(vec![part], &[0.5], 1, on_device, Box::new(report)).unwrap();
    drop(blender);
    check_device(&owner);
}

#[test]
#[ignore = "run by `no_memory_is_freed_under_pending_work`"]
fn trackers() {
    driver();
    for number in 0..devices().unwrap() {
        let owner = Owner::on(number);
        let mut model = Model::new(&owner);
        for device in [Device::AnyCuda, Device::Cpu] {
            let temp = tempfile::tempdir().unwrap();
            let options = PostHocEma::options(temp.path()).update_every(1).checkpoint_every(3).device(device);
            let mut ema = options.create(&model.device).unwrap();
            for step in 1..=7 {
                model.train(step);
                ema.update(&model.device).unwrap();
            }
            ema.abandon();
        }
        check_device(&owner);
    }
}

#[test]
fn no_memory_is_freed_under_pending_work() {
    for case in ["averages", "copies_to_host", "blends", "trackers"] {
        check_in_own_process(&format!("frees::{case}"), &[]);
    }
}
