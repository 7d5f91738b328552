//! Long work without the interpreter's lock, which reports its progress to a Python function.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use posthoc_ema::Error;
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::process;

/// Interval at which progress is reported and signals are checked.
const TICK: Duration = Duration::from_millis(50);

/// Function that the work calls with the bytes since its last call, from any thread.
pub type Progress<'a> = Option<&'a (dyn Fn(u64) + Sync)>;

/// Runs `work` without the interpreter's lock and calls `progress` in this thread with the bytes done so far.
///
/// An exception of the callback, or Ctrl-C, is raised after the work has ended: the work cannot be stopped halfway. If
/// the system cannot start a thread, the work does not begin.
pub fn run<R: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(Progress<'_>) -> PyResult<R> + Send,
) -> PyResult<R> {
    process::check()?;
    let Some(callback) = progress else { return py.detach(|| work(None)) };
    let done = AtomicU64::new(0);
    let has_ended = AtomicBool::new(false);
    let mut raised = None;
    let caller = thread::current();
    let result = thread::scope(|scope| {
        let (done, has_ended) = (&done, &has_ended);
        let worker = thread::Builder::new().spawn_scoped(scope, move || {
            let count = |bytes| {
                done.fetch_add(bytes, Ordering::Relaxed);
            };
            let result = work(Some(&count));
            has_ended.store(true, Ordering::Release);
            caller.unpark();
            result
        });
        let worker = worker.map_err(|source| to_python(Error::Threads { source }))?;
        // After a panic of the work, only `is_finished` shows the end.
        while !has_ended.load(Ordering::Acquire) && !worker.is_finished() {
            py.detach(|| thread::park_timeout(TICK));
            let reported = callback.call1((done.load(Ordering::Relaxed),)).and(py.check_signals());
            raised = raised.take().or(reported.err());
        }
        Ok::<_, PyErr>(py.detach(|| worker.join()))
    })?;
    let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    if let Some(error) = raised {
        return Err(error);
    }
    let result = result?;
    callback.call1((done.load(Ordering::Relaxed),))?;
    Ok(result)
}
