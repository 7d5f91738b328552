//! Tests of copies to the host during training.

use posthoc_ema::CudaMemory;
use posthoc_ema::compute::cuda::{CudaDevice, Offload};
use rand::Rng;

use crate::driver::{check_in_own_process, count};
use crate::owner::{Owned, Owner};
use crate::values::random;

const SIZES: [usize; 9] = [0, 1, 2, 15, 16, 17, 4099, (1 << 20) - 1, (1 << 20) + 13];

fn bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut random = random(seed);
    (0..n).map(|_| random.random()).collect()
}

#[test]
fn copy_of_every_size_and_alignment_keeps_bytes() {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    let mut offload = Offload::new(&device, &SIZES).unwrap();
    for round in 0..5 {
        let values: Vec<Vec<u8>> = SIZES.iter().map(|&n| bytes(round + n as u64, n)).collect();
        let owned: Vec<Owned<'_>> = values.iter().map(|v| owner.own(v, round as usize)).collect();
        let lent: Vec<CudaMemory<'_>> = owned.iter().map(Owned::lend).collect();
        let (staged, _) = offload.copy(&lent).unwrap();
        // The next training step, on the stream that waits for the copy.
        owned.iter().for_each(|memory| memory.set(&vec![0xee; memory.bytes]));
        let arrived = staged.wait().unwrap();
        values.iter().enumerate().for_each(|(i, v)| assert_eq!(arrived.tensor(i), v, "round {round}, tensor {i}"));
    }
}

#[test]
fn stream_that_waits_for_fence_may_change_tensor() {
    let owner = Owner::new();
    let device = CudaDevice::open(0).unwrap();
    let value = bytes(1, 3_000_000);
    let owned = owner.own(&value, 0);
    let mut offload = Offload::new(&device, &[value.len()]).unwrap();
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
    let mut offload = Offload::new(&device, &[value.len()]).unwrap();
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
    let mut offload = Offload::new(&device, &[100]).unwrap();
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
