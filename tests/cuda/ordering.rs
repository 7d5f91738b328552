//! The stand-in notices what is not ordered: here by a lie about the stream, the one way to do it wrong from outside.

use posthoc_ema::compute::cpu::{Layout, Precision};
use posthoc_ema::compute::cuda::{CudaDevice, DeviceAverages};
use posthoc_ema::{CudaMemory, Dtype};

use crate::driver::{alone, is_standin};
use crate::owner::Owner;

/// Parameters that one stream has just written, lent with another.
#[test]
#[ignore = "run by `a_wrong_stream_is_noticed`"]
fn wrong_stream() {
    let (owner, other) = (Owner::new(), Owner::new());
    if !is_standin() {
        return;
    }
    let memory = owner.own(&[0; 4000], 0);
    let device = CudaDevice::open(0).unwrap();
    let mut averages = DeviceAverages::zeros(&device, &Layout::new([1000]), 1, Precision::Plain, &[]).unwrap();
    // SAFETY: the memory lives on; that the stream is not the owner's is what the stand-in is to notice.
    let lent = unsafe { CudaMemory::from_raw(0, other.stream(), memory.address(), 4000) };
    let text = averages.update(&[(Dtype::F32, lent)], &[], &[1.0]).unwrap_err().to_string();
    assert!(text.contains("launch the update") && text.contains("(719)"), "{text}");
    // And it stays so, as on a real device.
    let text = averages.update(&[(Dtype::F32, memory.lend())], &[], &[1.0]).unwrap_err().to_string();
    assert!(text.contains("(719)") && text.contains("restart"), "{text}");
}

#[test]
fn a_wrong_stream_is_noticed() {
    alone("ordering::wrong_stream", &[]);
}

/// Blocks and threads from the last to the first: nothing may depend on their order.
#[test]
fn the_order_of_threads_does_not_matter() {
    if !is_standin() {
        return;
    }
    for part in ["update::", "blend::", "convert::", "offload::"] {
        let output = crate::driver::run_alone(part, &[("STANDIN_REVERSE", "1")], &crate::driver::standin());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}
