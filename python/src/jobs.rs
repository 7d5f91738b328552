//! Long work beside the interpreter, with progress told by the thread that asked for it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use pyo3::prelude::*;

use crate::process;

/// How often progress is told, and signals are looked for.
const TICK: Duration = Duration::from_millis(50);

/// What work tells its progress to: bytes since the last call, from any thread.
pub type Progress<'a> = Option<&'a (dyn Fn(u64) + Sync)>;

/// Does work without the interpreter's lock. `progress` is called with the bytes done so far, in this thread.
///
/// An exception of the callback, or Ctrl-C, is raised when the work is done: it cannot be stopped halfway.
pub fn run<R: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(Progress<'_>) -> PyResult<R> + Send,
) -> PyResult<R> {
    process::check()?;
    let Some(callback) = progress else { return py.detach(|| work(None)) };
    let (done, over, mut raised) = (AtomicU64::new(0), AtomicBool::new(false), None);
    let caller = thread::current();
    let result = thread::scope(|scope| {
        let (done, over) = (&done, &over);
        let worker = scope.spawn(move || {
            let count = |bytes| {
                done.fetch_add(bytes, Ordering::Relaxed);
            };
            let result = work(Some(&count));
            over.store(true, Ordering::Release);
            caller.unpark();
            result
        });
        // A panic ends the thread without a word.
        while !over.load(Ordering::Acquire) && !worker.is_finished() {
            py.detach(|| thread::park_timeout(TICK));
            let told = callback.call1((done.load(Ordering::Relaxed),)).and(py.check_signals());
            raised = raised.take().or(told.err());
        }
        py.detach(|| worker.join())
    });
    let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    if let Some(error) = raised {
        return Err(error);
    }
    let result = result?;
    callback.call1((done.load(Ordering::Relaxed),))?;
    Ok(result)
}
