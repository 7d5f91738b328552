//! The CUDA path against the CPU's, bit for bit: on the real driver where there is one, and otherwise on the stand-in that
//! is built here from the very same kernels.

mod blend;
mod convert;
mod driver;
mod faults;
mod model;
mod mutations;
mod offload;
mod ordering;
mod owner;
mod synthesis;
mod tracker;
mod update;
mod values;
