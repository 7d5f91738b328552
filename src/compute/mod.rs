//! Arithmetic on tensors, on the CPU and on CUDA devices: update, blend, convert, scan.
//!
//! Nothing here knows about files, profiles or runs: weights are plain numbers and tensors are bytes.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
