//! The program on CUDA devices: on the real driver if there is one, otherwise on the stand-in.

mod bench;
#[path = "../../../tests/cuda/driver.rs"]
mod driver;
mod program;
