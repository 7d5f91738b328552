//! The arithmetic, on whatever memory and device: update, blend, convert.
//!
//! Nothing here knows of files, profiles or runs: weights come in as numbers, tensors as bytes.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
