//! One process: the threads that do the work do not survive a fork.

use std::sync::OnceLock;

use pyo3::PyResult;
use pyo3::exceptions::PyRuntimeError;

static PROCESS: OnceLock<u32> = OnceLock::new();

/// Notes in which process the module was loaded.
pub fn note() {
    PROCESS.get_or_init(std::process::id);
}

/// Refuses work in a forked child, where it would wait for its threads for ever.
pub fn check() -> PyResult<()> {
    if PROCESS.get() == Some(&std::process::id()) {
        return Ok(());
    }
    Err(PyRuntimeError::new_err(
        "posthoc_ema does not work in a forked process: start it with multiprocessing's \"spawn\" or \"forkserver\"",
    ))
}
