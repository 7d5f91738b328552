//! Tests that the stand-in detects unordered work: a wrong stream, the only such error that a caller can make.

use posthoc_ema::compute::cpu::{Layout, Precision, UpdateWeights};
use posthoc_ema::compute::cuda::{CudaDevice, DeviceAverages};
use posthoc_ema::{CudaMemory, Dtype};

use crate::driver::{check_in_own_process, is_standin};
use crate::owner::Owner;

/// Passes parameters that one stream has just written with another stream.
#[test]
#[ignore = "run by `wrong_stream_is_reported`"]
fn wrong_stream() {
    let (owner, other) = (Owner::new(), Owner::new());
    if !is_standin() {
        return;
    }
    let memory = owner.own(&[0; 4000], 0);
    let device = CudaDevice::open(0).unwrap();
    let mut averages = DeviceAverages::zeros(&device, &Layout::new([1000]), 1, Precision::Plain, &[]).unwrap();
    // SAFETY: the memory stays allocated. The wrong stream is the error that the stand-in must report.
    let lent = unsafe { CudaMemory::from_raw(0, other.stream(), memory.address(), 4000) };
    let text = averages.update(&[(Dtype::F32, lent)], &[], UpdateWeights::at(1, &[1.0])).unwrap_err().to_string();
    assert!(text.contains("launch the update") && text.contains("(719)"), "{text}");
    // The error persists, as on a real device.
    let text =
        averages.update(&[(Dtype::F32, memory.lend())], &[], UpdateWeights::at(1, &[1.0])).unwrap_err().to_string();
    assert!(text.contains("(719)") && text.contains("restart"), "{text}");
}

#[test]
fn wrong_stream_is_reported() {
    check_in_own_process("ordering::wrong_stream", &[]);
}

/// Runs blocks and threads from the last to the first.
#[test]
fn reversed_order_of_threads_keeps_bits() {
    if !is_standin() {
        return;
    }
    for part in ["update::", "blend::", "offload::", "non_finite::"] {
        let output = crate::driver::run_in_own_process(part, &[("STANDIN_REVERSE", "1")], &crate::driver::standin());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}
