//! Dtypes by their names in safetensors files.

use posthoc_ema::{Dtype, TensorSpec};
use pyo3::prelude::*;

use crate::errors::argument;

/// Parses the name of a dtype.
pub fn parse_dtype(name: &str) -> PyResult<Dtype> {
    serde_json::from_value(serde_json::Value::String(name.to_owned()))
        .map_err(|_| argument(format!("`{name}` is not a dtype of safetensors files")))
}

/// Parses the name of a dtype, if there is one.
pub fn parse_optional_dtype(name: Option<&str>) -> PyResult<Option<Dtype>> {
    name.map(parse_dtype).transpose()
}

/// Returns name, dtype and shape of each tensor, as the package's `TensorSpecs`.
pub fn describe(tensors: Vec<TensorSpec>) -> Vec<(String, String, Vec<usize>)> {
    tensors.into_iter().map(|tensor| (tensor.name, tensor.dtype.to_string(), tensor.shape)).collect()
}
