//! The program `posthoc-ema` of the Python package: its console script, and `python -m posthoc_ema`.

use std::ffi::OsString;

use pyo3::prelude::*;

use crate::warnings::take_warnings;

/// Runs the program with arguments, the first of which is its name, and returns its exit status.
#[pyfunction]
pub fn run_program(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    let status = py.detach(|| posthoc_ema_cli::run_with(arguments));
    // The program has printed them.
    take_warnings();
    status
}
