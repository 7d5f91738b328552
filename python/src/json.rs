//! JSON, as which profiles, options and plans are passed to and from Python.

use pyo3::PyResult;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::errors::argument;

/// Parses a value. The error has no line and column: the user did not write the JSON.
pub fn from_json<T: DeserializeOwned>(json: &str) -> PyResult<T> {
    serde_json::from_str(json).map_err(|error| {
        let text = error.to_string();
        argument(text.split(" at line ").next().unwrap_or(&text))
    })
}

/// Formats a value.
pub fn to_json<T: Serialize + ?Sized>(value: &T) -> PyResult<String> {
    serde_json::to_string(value).map_err(argument)
}
