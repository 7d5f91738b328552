//! Warnings of averages that are far from what was asked for, on their way to Python's `warnings`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;

/// Warnings since the last call of [`take_warnings`].
static PENDING: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn pending() -> MutexGuard<'static, Vec<String>> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a warning for Python.
pub fn keep(text: String) {
    pending().push(text);
}

/// Returns the warnings since the last call.
#[pyfunction]
pub fn take_warnings() -> Vec<String> {
    std::mem::take(&mut pending())
}
