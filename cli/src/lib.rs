//! The program `posthoc-ema`: arguments in, calls to the library, and tables, pictures or JSON out.

pub mod bench;
mod commands;
mod log;
mod numbers;
mod pictures;
mod tables;
mod trials;

pub use commands::{run, run_with};
pub use log::log_to_stderr;
pub use pictures::{ErrorCurve, ErrorPoint, SweepCurve, SweepPoint, error_curve_png, sweep_png};
