//! Tests of updates in CUDA graphs: their bits are those of ordinary updates, and misuse is reported.

use std::path::Path;

use cudarc::driver::sys;
use posthoc_ema::{Device, Error, GraphStream, OnNonFinite, Options, PostHocEma, Profile, UpdateOutcome};

use crate::driver::{check_in_own_process, count, driver};
use crate::model::{Model, files};
use crate::owner::Owner;

/// Graph that is ready to be launched.
struct Graph<'o> {
    owner: &'o Owner,
    launchable: sys::CUgraphExec,
}

impl<'o> Graph<'o> {
    /// Captures what `work` queues on an owner's stream.
    fn capture(owner: &'o Owner, mode: sys::CUstreamCaptureMode, work: impl FnOnce()) -> Graph<'o> {
        owner.make_current();
        let stream = owner.stream() as sys::CUstream;
        let mut graph = std::ptr::null_mut();
        let mut launchable = std::ptr::null_mut();
        // SAFETY: the stream exists, and its context is current. The pointers are valid for the calls.
        unsafe {
            sys::cuStreamBeginCapture_v2(stream, mode).result().unwrap();
            work();
            owner.make_current();
            sys::cuStreamEndCapture(stream, &raw mut graph).result().unwrap();
            sys::cuGraphInstantiateWithFlags(&raw mut launchable, graph, 0).result().unwrap();
            sys::cuGraphDestroy(graph).result().unwrap();
        }
        Graph { owner, launchable }
    }

    /// Captures an update of the averages from a model.
    fn of(owner: &'o Owner, ema: &mut PostHocEma, model: &Model<'_>) -> Graph<'o> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        Graph::capture(owner, mode, || ema.capture_update(&model.device, stream(owner)).unwrap())
    }

    /// Launches the graph as a training does that does not know of the averages.
    fn launch(&self) {
        self.owner.make_current();
        // SAFETY: both exist, in the current context.
        unsafe { sys::cuGraphLaunch(self.launchable, self.owner.stream() as sys::CUstream) }.result().unwrap();
    }

    /// Launches the graph through the tracker.
    fn replay(&self, ema: &mut PostHocEma) -> Result<UpdateOutcome, Error> {
        ema.replay(stream(self.owner), || {
            self.launch();
            Ok(())
        })
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        self.owner.make_current();
        self.owner.wait();
        // SAFETY: it exists, and is not used afterwards.
        let _ = unsafe { sys::cuGraphExecDestroy(self.launchable) };
    }
}

/// Lends an owner's stream for a capture or a launch.
fn stream(owner: &Owner) -> GraphStream<'_> {
    // SAFETY: the stream exists, and the tests use the parameters in its order as long as they launch a graph.
    unsafe { GraphStream::from_raw(0, owner.stream()) }
}

fn options(dir: &Path, device: Device) -> Options {
    let lengths = (1..=10).map(|i| 0.025 * i as f64);
    let options = PostHocEma::options(dir).sigma_rels(lengths).update_every(2).checkpoint_every(6);
    options.snapshot_growth(None).device(device)
}

/// Reads an average without the model.
fn average(ema: &PostHocEma) -> posthoc_ema::Tensors {
    ema.synthesize(Profile::sigma_rel(0.1).unwrap()).unwrap()
}

#[test]
fn replays_have_the_bits_of_updates() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let (mut model, mut moved) = (Model::new(&owner), Model::new(&owner));
    let mut ema = options(&temp.path().join("graph"), Device::Cuda(0)).create(&model.device).unwrap();
    let mut twin = options(&temp.path().join("host"), Device::Cpu).create(&model.host).unwrap();
    let graph = Graph::of(&owner, &mut ema, &model);
    let second = Graph::of(&owner, &mut ema, &moved);
    assert_eq!(ema.step(), 0);
    for step in 1..=40 {
        model.train(step);
        moved.train(step);
        let expected = twin.update(&model.host).unwrap();
        let outcome = match step % 9 {
            // Updates outside of the graph, with the parameters at another place and back.
            4 => ema.update(&moved.device),
            5 => ema.update(&model.device),
            6..=7 => second.replay(&mut ema),
            _ => graph.replay(&mut ema),
        };
        assert_eq!(outcome.unwrap(), expected, "step {step}");
        assert_eq!(ema.step(), step);
        if step % 10 == 3 {
            assert!(average(&ema) == average(&twin), "step {step}");
            assert_eq!(ema.history().last(), twin.history().last());
            ema.swap_in(Profile::sigma_rel(0.2).unwrap(), &mut model.device).unwrap().restore().unwrap();
        }
        if step == 20 {
            ema.save().unwrap();
        }
    }
    ema.finish().unwrap();
    twin.finish().unwrap();
    assert!(files(&temp.path().join("graph")) == files(&temp.path().join("host")));
    drop(ema);
    let mut resumed = options(&temp.path().join("graph"), Device::Cuda(0)).resume(&model.device).unwrap();
    resumed.check_step(40).unwrap();
    let graph = Graph::of(&owner, &mut resumed, &model);
    for step in 41..=44 {
        model.train(step);
        twin.update(&model.host).unwrap();
        graph.replay(&mut resumed).unwrap();
    }
    assert!(average(&resumed) == average(&twin));
}

#[test]
fn replay_with_nan_changes_nothing_and_is_reported() {
    driver();
    for reaction in [OnNonFinite::Raise, OnNonFinite::Skip] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let make = |name: &str| {
            options(&temp.path().join(name), Device::Cuda(0)).on_non_finite(reaction).create(&model.device).unwrap()
        };
        let (mut ema, mut twin) = (make("graph"), make("device"));
        let graph = Graph::of(&owner, &mut ema, &model);
        for step in 1..=12 {
            model.train(step);
            if step == 6 || step == 7 {
                model.device.tensors[1].2.set(&[0xff; 5 * 1001 * 2]);
            }
            let expected = twin.update(&model.device).map_err(|error| error.to_string());
            let outcome = graph.replay(&mut ema).map_err(|error| error.to_string());
            assert_eq!(outcome, expected, "step {step}");
            assert_eq!(ema.history().last(), twin.history().last(), "step {step}");
        }
        assert!(average(&ema) == average(&twin));
    }
}

#[test]
fn launch_without_the_tracker_changes_nothing_and_is_reported() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let mut ema = options(temp.path(), Device::Cuda(0)).create(&model.device).unwrap();
    let graph = Graph::of(&owner, &mut ema, &model);
    graph.launch();
    owner.wait();
    let text = ema.save().unwrap_err().to_string();
    assert!(text.contains("has run once outside of `replay`") && text.contains("no step was counted"), "{text}");
    for step in 1..=2 {
        model.train(step);
        graph.replay(&mut ema).unwrap();
    }
    let before = average(&ema);
    model.train(3);
    graph.launch();
    graph.launch();
    owner.wait();
    assert!(average_after_error(&ema, "has run 2 times") == before);
    assert_eq!(ema.step(), 2);
    graph.replay(&mut ema).unwrap();
    graph.launch();
    graph.replay(&mut ema).unwrap();
    assert!(graph.replay(&mut ema).is_ok());
    let text = graph.replay(&mut ema).unwrap_err().to_string();
    assert!(text.contains("has run once"), "{text}");
    ema.finish().unwrap();
}

#[test]
fn second_launch_of_a_replay_changes_nothing() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let mut ema = options(&temp.path().join("graph"), Device::Cuda(0)).create(&model.device).unwrap();
    let mut twin = options(&temp.path().join("host"), Device::Cpu).create(&model.host).unwrap();
    let graph = Graph::of(&owner, &mut ema, &model);
    for step in 1..=4 {
        model.train(step);
        twin.update(&model.host).unwrap();
        let twice = || {
            graph.launch();
            graph.launch();
            Ok::<(), Error>(())
        };
        // A later call reports the first launch that was not announced.
        let _ = ema.replay(stream(&owner), twice);
    }
    owner.wait();
    while let Err(error) = ema.flush() {
        assert!(error.to_string().contains("or a graph has more than one"), "{error}");
    }
    assert!(average(&ema) == average(&twin));
}

/// Reads an average after an error with this text, which is returned once.
fn average_after_error(ema: &PostHocEma, text: &str) -> posthoc_ema::Tensors {
    let error = ema.synthesize(Profile::sigma_rel(0.1).unwrap()).err().map_or(String::new(), |error| error.to_string());
    assert!(error.contains(text), "{error}");
    average(ema)
}

#[test]
fn launch_that_does_not_update_is_reported_with_its_step() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let mut ema = options(&temp.path().join("graph"), Device::Cuda(0)).create(&model.device).unwrap();
    let mut twin = options(&temp.path().join("host"), Device::Cpu).create(&model.host).unwrap();
    let graph = Graph::of(&owner, &mut ema, &model);
    for step in 1..=8 {
        model.train(step);
        // The twin counts the step whose update is left out, and does not see it.
        twin.update(&if step == 4 { nan_in(&model) } else { model.host.clone() }).unwrap_or(UpdateOutcome::Skipped);
        let launched = ema.replay(stream(&owner), || {
            if step != 4 {
                graph.launch();
            }
            Ok::<(), Error>(())
        });
        if step == 6 {
            let text = launched.unwrap_err().to_string();
            assert!(text.contains("step 4") && text.contains("has no captured update"), "{text}");
        } else {
            launched.unwrap();
        }
    }
    assert!(average(&ema) == average(&twin));
    assert_eq!(ema.history().last(), Some(8));
}

/// Returns the model's tensors with a NaN, which leaves out an update.
fn nan_in(model: &Model<'_>) -> posthoc_ema::Tensors {
    let mut host = model.host.clone();
    let mut tensor = host.get("a.weight").unwrap().clone();
    tensor.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    host.insert("a.weight", tensor);
    host
}

#[test]
fn failed_launch_counts_no_step() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let mut ema = options(temp.path(), Device::Cuda(0)).create(&model.device).unwrap();
    let graph = Graph::of(&owner, &mut ema, &model);
    let failed = || Error::Internal("the launch has failed".into());
    for step in 1..=2 {
        let text = ema.replay(stream(&owner), || Err(failed())).unwrap_err().to_string();
        assert!(text.contains("the launch has failed"), "{text}");
        assert_eq!(ema.step(), step - 1);
        model.train(step);
        graph.replay(&mut ema).unwrap();
    }
    let before = average(&ema);
    // Not prepared any more: a launch after a failed one changes nothing.
    graph.replay(&mut ema).unwrap();
    ema.replay(stream(&owner), || Err(failed())).unwrap_err();
    model.train(3);
    graph.launch();
    owner.wait();
    assert!(average_after_error(&ema, "outside of `replay`") == before);
    // A launch that was queued before its error has done the update.
    let both = || {
        graph.launch();
        Err(failed())
    };
    ema.replay(stream(&owner), both).unwrap_err();
    assert_eq!((ema.step(), ema.history().last()), (4, Some(4)));
    assert!(average(&ema) != before);
}

#[test]
fn captures_that_cannot_be_are_refused() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let owner = Owner::new();
    let model = Model::new(&owner);
    let mut offloaded = options(&temp.path().join("cpu"), Device::Cpu).create(&model.device).unwrap();
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let _empty = Graph::capture(&owner, mode, || {
        let text = offloaded.capture_update(&model.device, stream(&owner)).unwrap_err().to_string();
        assert!(text.contains("in host memory") && text.contains("device \"cuda\""), "{text}");
    });
    let text = offloaded.replay(stream(&owner), || Ok::<(), Error>(())).unwrap_err().to_string();
    assert!(text.contains("in host memory"), "{text}");
    let mut ema = options(&temp.path().join("cuda"), Device::Cuda(0)).create(&model.device).unwrap();
    let text = ema.capture_update(&model.device, stream(&owner)).unwrap_err().to_string();
    assert!(text.contains("not being captured"), "{text}");
    let text = ema.replay(stream(&owner), || Ok::<(), Error>(())).unwrap_err().to_string();
    assert!(text.contains("capture it first"), "{text}");
    assert_eq!((ema.step(), offloaded.step()), (0, 0));
}

/// Runs in its own process: in the mode of `torch.cuda.graph`, calls of other tests invalidate a capture.
#[test]
#[ignore = "run by `graphs_in_their_own_process`"]
fn graph_keeps_the_memory_of_its_tracker() {
    driver();
    let temp = tempfile::tempdir().unwrap();
    let (owner, other) = (Owner::new(), Owner::new());
    let mut model = Model::new(&owner);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    let bytes = || count("device_bytes").unwrap_or(0);
    let before = bytes();
    let mut ema = options(&temp.path().join("1"), Device::Cuda(0)).create(&model.device).unwrap();
    let mut graphs = Vec::new();
    // A capture of another stream stays valid, and so does the one of the parameters' stream.
    let _other = Graph::capture(&other, mode, || {
        let captured = || ema.capture_update(&model.device, stream(&owner)).unwrap();
        graphs.push(Graph::capture(&owner, mode, captured));
    });
    for step in 1..=2 {
        model.train(step);
        graphs[0].replay(&mut ema).unwrap();
    }
    ema.finish().unwrap();
    drop(ema);
    let kept = bytes();
    assert!(kept > before);
    graphs[0].launch();
    owner.wait();
    graphs.clear();
    // The driver's callback frees nothing; the next tracker does.
    assert_eq!(bytes(), kept);
    let next = options(&temp.path().join("2"), Device::Cuda(0)).create(&model.device).unwrap();
    drop(next);
    assert_eq!(bytes(), before);
}

#[test]
fn graphs_in_their_own_process() {
    check_in_own_process("graphs::graph_keeps_the_memory_of_its_tracker", &[]);
}
