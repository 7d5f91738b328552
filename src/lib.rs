//! Averages of network weights of any length, chosen after training.

pub mod compute;
mod error;
pub mod math;
#[cfg(feature = "report")]
pub mod report;
pub mod snapshot;
mod synthesis;
pub mod tensor;
mod tracker;

pub use compute::cpu::Precision;
pub use error::{Error, Result};
pub use math::{Profile, Shape, Window};
pub use synthesis::{At, Forecast, Output, Plan, Run, Weight, WriteOptions};
pub use tensor::*;
pub use tracker::{Options, PostHocEma, Step};
