//! Errors of single tensors.

use std::fmt;

use posthoc_ema::Error;

/// Makes the error of a tensor, with the reason why it cannot be read or written.
pub fn tensor_error(name: &str, reason: impl fmt::Display) -> Error {
    Error::Tensor { tensor: name.to_owned(), reason: reason.to_string() }
}
