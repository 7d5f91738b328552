//! Tests of copies to the host during training.

use posthoc_ema::CudaMemory;
use posthoc_ema::compute::cuda::{CudaDevice, Offload};
use rand::Rng;

use crate::driver::{check_in_own_process, count, stalled};
use crate::owner::{Owned, Owner};
use crate::values::random;

const SIZES: [usize; 9] = [0, 1, 2, 15, 16, 17, 4099, (1 << 20) - 1, (1 << 20) + 13];

fn bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut random = random(seed);
    (0..n).map(|_| random.random()).collect()
}

/// Lends memory, until the fence or in the order of its stream.
fn lend<'m>(memory: &'m Owned<'_>, until_fence: bool) -> CudaMemory<'m> {
    // SAFETY: the tests wait for the fence before they change the memory.
    if until_fence { unsafe { memory.lend().until_fence() } } else { memory.lend() }
}

#[test]
fn copy_of_every_size_and_alignment_keeps_bytes() {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    for copies_on_device in [false, true] {
        let mut offload = Offload::new(&device, &SIZES, copies_on_device).unwrap();
        for round in 0..6 {
            let values: Vec<Vec<u8>> = SIZES.iter().map(|&n| bytes(round + n as u64, n)).collect();
            let owned: Vec<Owned<'_>> = values.iter().map(|v| owner.own(v, round as usize)).collect();
            // Some tensors are lent until the fence, others not.
            let is_fenced = |i: usize| round > 0 && (i as u64 + round).is_multiple_of(round);
            let lent: Vec<CudaMemory<'_>> = owned.iter().enumerate().map(|(i, m)| lend(m, is_fenced(i))).collect();
            let (staged, fence) = offload.copy(&lent).unwrap();
            // The next training step: the stream waits for the copy of the tensors that are not fenced.
            let change = |fenced: bool| {
                let chosen = owned.iter().enumerate().filter(|(i, _)| is_fenced(*i) == fenced);
                chosen.for_each(|(_, memory)| memory.set(&vec![0xee; memory.bytes]));
            };
            change(false);
            // SAFETY: it is the owner's stream, in the same context.
            unsafe { fence.wait_on(owner.stream()) }.unwrap();
            change(true);
            let arrived = staged.wait().unwrap();
            values.iter().enumerate().for_each(|(i, v)| assert_eq!(arrived.tensor(i), v, "round {round}, tensor {i}"));
        }
    }
}

/// More small tensors than the buffer of the device has room for.
#[test]
fn small_tensors_are_gathered_in_batches() {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    let sizes = [(1 << 20) - 5; 70];
    let values: Vec<Vec<u8>> = (0..70).map(|i| vec![i as u8; sizes[0]]).collect();
    let owned: Vec<Owned<'_>> = values.iter().map(|v| owner.own(v, 0)).collect();
    let mut offload = Offload::new(&device, &sizes, false).unwrap();
    assert_eq!(offload.device_bytes(), 32 << 20);
    for _ in 0..2 {
        let lent: Vec<CudaMemory<'_>> = owned.iter().map(Owned::lend).collect();
        let arrived = offload.copy(&lent).unwrap().0.wait().unwrap();
        assert!((0..70).all(|i| arrived.tensor(i) == values[i]));
    }
}

/// The kernel writes to the device, so that it does not run for as long as the bus takes.
#[test]
#[ignore = "run by `gathering_does_not_use_the_bus`"]
fn gathering() {
    let owner = Owner::new();
    let Some(before) = count("kernel_bus_bytes") else { return };
    let device = CudaDevice::open(0).unwrap();
    let owned: Vec<Owned<'_>> = (0..100).map(|i| owner.own(&[i as u8; 10_000], 0)).collect();
    let lent: Vec<CudaMemory<'_>> = owned.iter().map(Owned::lend).collect();
    let mut offload = Offload::new(&device, &[10_000; 100], false).unwrap();
    let arrived = offload.copy(&lent).unwrap().0.wait().unwrap();
    assert!((0..100).all(|i| arrived.tensor(i) == [i as u8; 10_000]));
    assert_eq!(count("kernel_bus_bytes").unwrap() - before, 0);
}

#[test]
fn gathering_does_not_use_the_bus() {
    check_in_own_process("offload::gathering", &[]);
}

const LARGE: usize = 4 << 20;

/// Returns the nanoseconds for which a copy of 16 MB, of which the last tensor is fenced, holds the owner's stream up.
fn stall_of_a_copy(copies_on_device: bool, fenced: usize, waits_at_fence: bool) -> u64 {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    let owned: Vec<Owned<'_>> = (0..4).map(|i| owner.own(&vec![i as u8; LARGE], 0)).collect();
    let lent: Vec<CudaMemory<'_>> = owned.iter().enumerate().map(|(i, m)| lend(m, i >= 4 - fenced)).collect();
    let mut offload = Offload::new(&device, &[LARGE; 4], copies_on_device).unwrap();
    owner.wait();
    let before = stalled(owner.stream());
    let (pending, fence) = offload.copy(&lent).unwrap();
    if waits_at_fence {
        // SAFETY: it is the owner's stream, in the same context.
        unsafe { fence.wait_on(owner.stream()) }.unwrap();
    }
    pending.wait().unwrap();
    stalled(owner.stream()) - before
}

/// By the clocks of the stand-in: 50 bytes per nanosecond on the bus, 3,000 in the device's memory.
#[test]
#[ignore = "run by `stream_waits_for_what_it_must`"]
fn stalls() {
    let bus = LARGE as u64 / 50;
    for (fenced, at_fence, tensors) in [(0, false, 4), (1, false, 3), (4, false, 0), (1, true, 4), (4, true, 4)] {
        let stall = stall_of_a_copy(false, fenced, at_fence);
        assert!(stall.abs_diff(tensors * bus) < bus / 10, "{fenced} {at_fence}: {stall} ns");
    }
    for (fenced, at_fence) in [(0, false), (1, false), (4, true)] {
        let stall = stall_of_a_copy(true, fenced, at_fence);
        assert!(stall < 4 * bus / 50, "on the device: {stall} ns");
    }
    assert_eq!(stall_of_a_copy(true, 4, false), 0);
}

#[test]
fn stream_waits_for_what_it_must() {
    check_in_own_process("offload::stalls", &[]);
}

#[test]
#[ignore = "run by `full_device_takes_smaller_batches`"]
fn full_device() {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    let sizes = [500_000; 60];
    let error = Offload::new(&device, &sizes, true).unwrap_err().to_string();
    assert!(error.contains("30.0 MB for a copy of the parameters"), "{error}");
    let owned: Vec<Owned<'_>> = (0..2).map(|i| owner.own(&vec![i; 500_000], 0)).collect();
    let mut offload = Offload::new(&device, &sizes, false).unwrap();
    assert!(offload.device_bytes() < 10 << 20, "{}", offload.device_bytes());
    let lent: Vec<CudaMemory<'_>> = (0..60).map(|i| owned[i % 2].lend()).collect();
    let arrived = offload.copy(&lent).unwrap().0.wait().unwrap();
    assert!((0..60).all(|i| arrived.tensor(i) == vec![(i % 2) as u8; 500_000]));
}

#[test]
fn full_device_takes_smaller_batches() {
    check_in_own_process("offload::full_device", &[("STANDIN_MEMORY", "10000000")]);
}

/// Large pinned memory is registered; if the driver refuses that, it allocates.
#[test]
#[ignore = "run by `large_pinned_memory_is_registered`"]
fn registered() {
    let owner = Owner::new();
    let Some(before) = count("registered_bytes") else { return };
    let device = CudaDevice::open(0).unwrap();
    let value = bytes(9, 5_000_001);
    let owned = owner.own(&value, 0);
    let mut offload = Offload::new(&device, &[value.len()], false).unwrap();
    let registered = count("registered_bytes").unwrap() - before;
    assert!(if std::env::var_os("STANDIN_REGISTER").is_some() { registered == 0 } else { registered >= 10_000_002 });
    assert!(offload.copy(&[owned.lend()]).unwrap().0.wait().unwrap().tensor(0) == value);
    drop(offload);
    assert_eq!((count("registered_bytes"), count("pinned_bytes")), (Some(before), Some(0)));
}

#[test]
fn large_pinned_memory_is_registered() {
    check_in_own_process("offload::registered", &[]);
    check_in_own_process("offload::registered", &[("STANDIN_REGISTER", "0")]);
}

/// The system would end the process long before the memory is there.
#[test]
fn memory_beyond_the_limit_is_refused_before_it_is_taken() {
    crate::driver::driver();
    let device = CudaDevice::open(0).unwrap();
    let error = posthoc_ema::compute::cuda::Pinned::new(&device, 1 << 45).unwrap_err().to_string();
    let parts = ["take 35184372.1 MB", " leaves ", "raise the limit", "keep the averages on the device"];
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
}

#[test]
fn stream_that_waits_for_fence_may_change_tensor() {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    let value = bytes(1, 3_000_000);
    let owned = owner.own(&value, 0);
    let mut offload = Offload::new(&device, &[value.len()], false).unwrap();
    // SAFETY: the memory changes only after its stream has waited for the fence.
    let lent = unsafe { owned.lend().until_fence() };
    let (staged, fence) = offload.copy(&[lent]).unwrap();
    // SAFETY: it is the owner's stream, in the same context.
    unsafe { fence.wait_on(owner.stream()) }.unwrap();
    owned.set(&vec![1; value.len()]);
    assert_eq!(staged.wait().unwrap().tensor(0), value);
    fence.wait().unwrap();
}

/// A copy of the training waits for the piece that is on the bus, and not for a whole tensor.
#[test]
#[ignore = "run by `large_tensors_are_copied_in_pieces`"]
fn pieces() {
    let owner = Owner::new();
    let Some(before) = count("copies") else { return };
    let device = CudaDevice::open(0).unwrap();
    let value = bytes(3, (20 << 20) + 5);
    let owned = owner.own(&value, 0);
    let mut offload = Offload::new(&device, &[value.len()], false).unwrap();
    let uploads = count("copies").unwrap() - before;
    let arrived = offload.copy(&[owned.lend()]).unwrap().0.wait().unwrap();
    assert_eq!(count("copies").unwrap() - before - uploads, 3);
    assert!(arrived.tensor(0) == value);
}

#[test]
fn large_tensors_are_copied_in_pieces() {
    check_in_own_process("offload::pieces", &[]);
}

/// The third copy waits until one of the first two is folded, which bounds the locked memory.
#[test]
fn third_pending_copy_blocks() {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    let owned = owner.own(&[5; 100], 0);
    let mut offload = Offload::new(&device, &[100], false).unwrap();
    let first = offload.copy(&[owned.lend()]).unwrap().0;
    let second = offload.copy(&[owned.lend()]).unwrap().0;
    let (done, folded) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let third = offload.copy(&[owned.lend()]).unwrap().0;
            done.send(()).unwrap();
            assert_eq!(third.wait().unwrap().tensor(0), [5; 100]);
        });
        assert!(folded.recv_timeout(std::time::Duration::from_millis(100)).is_err(), "the third copy did not wait");
        drop(first.wait().unwrap());
        folded.recv().unwrap();
    });
    assert_eq!(second.wait().unwrap().tensor(0), [5; 100]);
}
