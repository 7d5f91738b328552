//! Tests of the waits of a training and of the host, by the clocks and the counters of the stand-in.

use std::path::Path;

use posthoc_ema::{Device, Dtype, Error, Options, Parameters, PostHocEma, Profile, Result, TensorView};

use crate::driver::{check_in_own_process, count, driver, stalled, work};
use crate::model::Model;
use crate::owner::{Owned, Owner};

fn options(dir: &Path) -> Options {
    PostHocEma::options(dir).update_every(1).checkpoint_every(10).snapshot_growth(None)
}

/// A step of 1 ms for an update of 0.04 ms on the bus: by the stand-in's clocks, the training never waits.
#[test]
#[ignore = "run by `training_does_not_wait_for_the_bus`"]
fn step_time() {
    driver();
    let owner = Owner::new();
    let memory = owner.own(&vec![0; 2 << 20], 0);
    let stall = |until_fence: bool, device_copy: bool| {
        let temp = tempfile::tempdir().unwrap();
        let model = OneTensor { memory: &memory, until_fence };
        let options = options(temp.path()).checkpoint_every(1000).device_copy(device_copy);
        let mut ema = options.create(&model).unwrap();
        assert!(ema.placement().contains(if device_copy { "for that alone" } else { "waits for the bus" }));
        let before = stalled(owner.stream());
        for step in 1..=8 {
            work(owner.stream(), 900_000); // forward and backward
            if let Some(fence) = ema.fence() {
                // SAFETY: the owner's stream, in the primary context.
                unsafe { fence.wait_on(owner.stream()) }.unwrap();
            }
            work(owner.stream(), 100_000); // the optimizer's step
            memory.set(&vec![step; 2 << 20]);
            ema.update(&model).unwrap();
        }
        stalled(owner.stream()) - before
    };
    let bus = (2 << 20) / 50;
    assert!(stall(false, false) >= 8 * bus);
    assert_eq!(stall(true, false), 0);
    assert!(stall(false, true) < 8 * bus / 20);
}

#[test]
fn training_does_not_wait_for_the_bus() {
    check_in_own_process("waiting::step_time", &[]);
}

/// Model of one tensor of f32.
struct OneTensor<'o> {
    memory: &'o Owned<'o>,
    until_fence: bool,
}

impl Parameters for OneTensor<'_> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        // SAFETY: the tests change the memory only after its stream has waited for the fence.
        let lent = if self.until_fence { unsafe { self.memory.lend().until_fence() } } else { self.memory.lend() };
        read(&[TensorView::cuda("w", Dtype::F32, &[self.memory.bytes / 4], lent)?])
    }
}

/// Parameters of 10 MB, for which a training needs 30 MB more, and averages of 30 MB.
#[test]
#[ignore = "run by `automatic_choices_leave_memory_to_the_training`"]
fn little_memory() {
    driver();
    let owner = Owner::new();
    let memory = owner.own(&vec![1; 10_000_000], 0);
    let model = OneTensor { memory: &memory, until_fence: false };
    let placement = |device_copy: Option<bool>, device: Device| {
        let temp = tempfile::tempdir().unwrap();
        let mut ema = options(temp.path()).device(device).device_copy(device_copy).create(&model)?;
        ema.update(&model)?;
        Ok::<String, Error>(ema.placement())
    };
    let total: Option<u64> = std::env::var("STANDIN_MEMORY").ok().and_then(|bytes| bytes.parse().ok());
    let has_room = total.is_none_or(|bytes| bytes > 100_000_000);
    let automatic = placement(None, Device::Cpu).unwrap();
    let is_copied = automatic.contains("10.0 MB on cuda:0") && automatic.contains("for that alone");
    assert_eq!(is_copied, has_room, "{automatic}");
    assert!(placement(Some(false), Device::Cpu).unwrap().contains("waits for the bus"));
    match placement(Some(true), Device::Cpu) {
        Ok(way) => assert!(has_room && way.contains("for that alone")),
        Err(error) => {
            let text = error.to_string();
            assert!(!has_room && text.contains("a copy of the parameters") && text.contains("`device_copy`"), "{text}");
        }
    }
    let chosen = placement(None, Device::Auto).unwrap();
    assert_eq!(chosen.contains("averages on cuda:0"), total.is_none(), "{chosen}");
}

#[test]
fn automatic_choices_leave_memory_to_the_training() {
    check_in_own_process("waiting::little_memory", &[]);
    // Averages of 30 MB are less than a quarter of 140 MB, but not of what the training leaves.
    check_in_own_process("waiting::little_memory", &[("STANDIN_MEMORY", "150000000")]);
    check_in_own_process("waiting::little_memory", &[("STANDIN_MEMORY", "18000000")]);
}

/// The device has given its memory to another program since it was asked.
#[test]
#[ignore = "run by `refused_device_copy_falls_back`"]
fn refused_copy() {
    driver();
    let owner = Owner::new();
    let memory = owner.own(&vec![1; 1_000_000], 0);
    let model = OneTensor { memory: &memory, until_fence: false };
    let temp = tempfile::tempdir().unwrap();
    let mut ema = options(temp.path()).create(&model).unwrap();
    assert!(ema.placement().contains("waits for the bus"), "{}", ema.placement());
    ema.update(&model).unwrap();
    ema.finish().unwrap();
}

#[test]
fn refused_device_copy_falls_back() {
    check_in_own_process("waiting::refused_copy", &[("STANDIN_FAIL_ALLOC", "2")]);
}

#[test]
#[ignore = "run by `no_wait_spins`"]
fn spins() {
    driver();
    let Some(before) = count("spins") else { return };
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let mut ema = options(temp.path()).device(device).create(&model.device).unwrap();
        for step in 1..=12 {
            model.train(step);
            ema.update(&model.device).unwrap();
        }
        ema.swap_in(Profile::sigma_rel(0.1).unwrap(), &mut model.device).unwrap().restore().unwrap();
        ema.finish().unwrap();
        drop(ema);
        assert_eq!(count("spins").unwrap() - before, 0, "{device}");
    }
}

#[test]
fn no_wait_spins() {
    check_in_own_process("waiting::spins", &[]);
}
