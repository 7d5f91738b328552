//! The program on CUDA devices, with the real driver if there is one and the stand-in otherwise.

mod bench;
#[path = "../../../tests/cuda/driver.rs"]
#[allow(dead_code, reason = "the tests of the library use the rest")]
mod driver;
mod program;
