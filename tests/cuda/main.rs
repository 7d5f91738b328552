//! Tests of the CUDA path, compared with the CPU's bit for bit.
//!
//! They run on the real driver if there is one, and otherwise on the stand-in, which is built from the same kernels.

mod blend;
mod capture;
mod driver;
mod faults;
mod frees;
mod graphs;
#[path = "../../src/tracker/tests/log.rs"]
mod log;
mod model;
mod mutations;
mod non_finite;
mod offload;
mod ordering;
mod owner;
mod reader;
mod spread;
mod submissions;
mod synthesis;
mod tracker;
mod update;
mod values;
mod waiting;
