//! The program `posthoc-ema`, run by `python -m posthoc_ema`.

use std::ffi::OsString;

use pyo3::prelude::*;

/// Runs the program with arguments, the first of which is its name, and returns its exit status.
#[pyfunction]
pub fn run_program(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| posthoc_ema_cli::run_with(arguments))
}
