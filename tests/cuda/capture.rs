//! Tests beside captures of CUDA graphs: those of other streams stay valid, and work on a captured stream is refused.

use std::path::Path;

use cudarc::driver::sys;
use posthoc_ema::{Device, Options, PostHocEma, Profile};

use crate::driver::{check_in_own_process, driver};
use crate::model::{Model, files};
use crate::owner::Owner;

fn options(dir: &Path, device: Device) -> Options {
    PostHocEma::options(dir).update_every(1).checkpoint_every(3).snapshot_growth(None).device(device)
}

/// Begins a capture of an owner's stream in the mode that `torch.cuda.graph` uses.
pub fn begin_capture(owner: &Owner) {
    owner.make_current();
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: the stream exists, and its context is current.
    unsafe { sys::cuStreamBeginCapture_v2(owner.stream() as sys::CUstream, mode) }.result().unwrap();
}

/// Ends a capture, which fails if a call has invalidated it.
pub fn end_capture(owner: &Owner) {
    owner.make_current();
    let mut graph = std::ptr::null_mut();
    // SAFETY: as above, and the pointer is valid for the call.
    unsafe { sys::cuStreamEndCapture(owner.stream() as sys::CUstream, &raw mut graph) }.result().unwrap();
    // SAFETY: the graph was just made, and is not used.
    unsafe { sys::cuGraphDestroy(graph) }.result().unwrap();
}

/// Runs in its own process: in the default mode, calls of other tests invalidate a capture.
#[test]
#[ignore = "run by `captures_and_this_library_keep_apart`"]
fn no_call_invalidates_a_capture_of_another_stream() {
    driver();
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let (owner, other) = (Owner::new(), Owner::new());
        let mut model = Model::new(&owner);
        begin_capture(&other);
        let mut ema = options(temp.path(), device).create(&model.device).unwrap();
        for step in 1..=10 {
            model.train(step);
            ema.update(&model.device).unwrap();
        }
        ema.save().unwrap();
        ema.swap_in(Profile::sigma_rel(0.1).unwrap(), &mut model.device).unwrap().restore().unwrap();
        ema.finish().unwrap();
        drop(ema);
        end_capture(&other);
    }
}

#[test]
#[ignore = "run by `captures_and_this_library_keep_apart`"]
fn update_on_a_captured_stream_is_refused_and_changes_nothing() {
    driver();
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let mut ema = options(&temp.path().join("device"), device).create(&model.device).unwrap();
        let mut twin = options(&temp.path().join("host"), Device::Cpu).create(&model.host).unwrap();
        for step in 1..=7 {
            model.train(step);
            owner.wait();
            if step == 4 {
                begin_capture(&owner);
                let text = ema.update(&model.device).unwrap_err().to_string();
                assert!(text.contains("captured in a CUDA graph") && text.contains("after the capture"), "{text}");
                let profile = Profile::sigma_rel(0.1).unwrap();
                let refused = ema.swap_in(profile, &mut model.device).map(drop).unwrap_err().to_string();
                assert!(refused.contains("captured in a CUDA graph"), "{refused}");
                end_capture(&owner);
            }
            ema.update(&model.device).unwrap();
            twin.update(&model.host).unwrap();
        }
        ema.finish().unwrap();
        twin.finish().unwrap();
        assert!(files(&temp.path().join("device")) == files(&temp.path().join("host")), "{device}");
    }
}

/// Acts while a blocking stream is captured, and checks that the capture stays valid. Such a stream is ordered with the
/// default stream, on which no work may be queued meanwhile.
pub fn beside_capture_of_blocking_stream(mode: sys::CUstreamCaptureMode, act: impl FnOnce()) {
    let owner = Owner::new();
    owner.make_current();
    let mut stream = std::ptr::null_mut();
    let mut graph = std::ptr::null_mut();
    // SAFETY: the context is current, and the pointer is valid for the call.
    unsafe { sys::cuStreamCreate(&raw mut stream, 0).result().unwrap() };
    // SAFETY: the stream exists.
    unsafe { sys::cuStreamBeginCapture_v2(stream, mode) }.result().unwrap();
    act();
    owner.make_current();
    // SAFETY: as above, and the pointer is valid for the call.
    unsafe { sys::cuStreamEndCapture(stream, &raw mut graph) }.result().unwrap();
}

#[test]
#[ignore = "run by `captures_and_this_library_keep_apart`"]
fn overflow_in_a_blend_keeps_the_capture_of_a_blocking_stream() {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    beside_capture_of_blocking_stream(mode, crate::blend::overflow_is_reported_as_on_cpu);
}

#[test]
fn captures_and_this_library_keep_apart() {
    check_in_own_process("capture::no_call_invalidates_a_capture_of_another_stream", &[]);
    check_in_own_process("capture::overflow_in_a_blend_keeps_the_capture_of_a_blocking_stream", &[]);
    check_in_own_process("capture::update_on_a_captured_stream_is_refused_and_changes_nothing", &[]);
}
