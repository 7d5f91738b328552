//! Updates in CUDA graphs. The graphs are PyTorch's.

use posthoc_ema::{PostHocEma, UpdateOutcome};
use pyo3::prelude::*;

use crate::lend::{Lent, Streams};

/// Adds an update to the graph that the stream of the tensors is captured into.
#[cfg(feature = "cuda")]
pub fn capture(tracker: &mut PostHocEma, lent: &Lent<'_>, streams: &Streams) -> PyResult<()> {
    tracker.capture_update(lent, only_stream(streams)?).map_err(crate::errors::to_python)
}

/// Counts a step, at `time` if that is given, and calls `launch` with the interpreter's lock.
#[cfg(feature = "cuda")]
pub fn replay(
    tracker: &mut PostHocEma,
    streams: &Streams,
    launch: &Py<PyAny>,
    time: Option<u64>,
) -> PyResult<UpdateOutcome> {
    /// Error of the tracker or of `launch`.
    struct Failure(PyErr);

    impl From<posthoc_ema::Error> for Failure {
        fn from(error: posthoc_ema::Error) -> Failure {
            Failure(crate::errors::to_python(error))
        }
    }

    let launched = || Python::attach(|py| launch.call0(py)).map(drop).map_err(Failure);
    let stream = only_stream(streams)?;
    let outcome = match time {
        Some(time) => tracker.replay_at(time, stream, launched),
        None => tracker.replay(stream, launched),
    };
    outcome.map_err(|failure| failure.0)
}

/// Returns the stream of a model on one device.
#[cfg(feature = "cuda")]
fn only_stream(streams: &Streams) -> PyResult<posthoc_ema::GraphStream<'static>> {
    let mut each = streams.iter();
    match (each.next(), each.next()) {
        (Some((&device, &stream)), None) => Ok(crate::lend::graph_stream(device, stream)),
        _ => Err(crate::errors::argument("an update in a CUDA graph needs a model on one GPU")),
    }
}

/// Refuses a capture in a build without CUDA.
#[cfg(not(feature = "cuda"))]
pub fn capture(_: &mut PostHocEma, _: &Lent<'_>, _: &Streams) -> PyResult<()> {
    Err(without_cuda())
}

/// Refuses a replay in a build without CUDA.
#[cfg(not(feature = "cuda"))]
pub fn replay(_: &mut PostHocEma, _: &Streams, _: &Py<PyAny>, _: Option<u64>) -> PyResult<UpdateOutcome> {
    Err(without_cuda())
}

#[cfg(not(feature = "cuda"))]
fn without_cuda() -> PyErr {
    crate::errors::argument("an update in a CUDA graph needs a build of the package with CUDA")
}
