//! Conversion of the library's errors into Python's built-in exceptions.

use std::io;

use posthoc_ema::Error;
use pyo3::PyErr;
use pyo3::exceptions::{
    PyBlockingIOError, PyFileExistsError, PyFileNotFoundError, PyOSError, PyRuntimeError, PyValueError,
};

/// Converts an error into the exception of its kind, with the same text.
pub fn to_python(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Io { path, source, .. } => from_io(&path.display().to_string(), &source, text),
        Error::NoRun { .. } | Error::NoState { .. } => PyFileNotFoundError::new_err(text),
        Error::LockedHere { .. } => PyBlockingIOError::new_err(text),
        Error::RunExists { .. } => PyFileExistsError::new_err(text),
        Error::Locked { .. }
        | Error::LockLost { .. }
        | Error::NonFinite { .. }
        | Error::NonFiniteParameter { .. }
        | Error::Cuda { .. }
        | Error::DeviceMemory { .. }
        | Error::NoTarget
        | Error::NoSource { .. }
        | Error::NoUpdate
        | Error::NothingToAverage
        | Error::OtherPlan { .. }
        | Error::Count { .. }
        | Error::Internal(_)
        | Error::Threads { .. }
        | Error::Wrong { .. } => PyRuntimeError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

/// Makes an `OSError`; Python chooses the subclass, such as `PermissionError`, by the error number.
fn from_io(path: &str, source: &io::Error, text: String) -> PyErr {
    match source.raw_os_error() {
        Some(number) => PyOSError::new_err((number, text, path.to_owned())),
        None => PyOSError::new_err(text),
    }
}

/// Makes a `ValueError` for an argument that the package's Python code should not have passed.
pub fn argument(what: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(what.to_string())
}
