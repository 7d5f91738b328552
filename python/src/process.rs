//! Detection of forks: the library's threads do not survive one.

use std::sync::OnceLock;

use pyo3::PyResult;
use pyo3::exceptions::PyRuntimeError;

static LOADED_IN: OnceLock<u32> = OnceLock::new();

/// Records the process in which the module is loaded.
pub fn record() {
    LOADED_IN.get_or_init(std::process::id);
}

/// Returns an error in a forked child, where work would wait for its threads forever.
pub fn check() -> PyResult<()> {
    if LOADED_IN.get() == Some(&std::process::id()) {
        return Ok(());
    }
    Err(PyRuntimeError::new_err(
        "posthoc_ema does not work in a forked process: start it with multiprocessing's \"spawn\" or \"forkserver\"",
    ))
}
