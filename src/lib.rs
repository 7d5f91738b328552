//! Averages of network weights of any length, chosen after training.

pub mod compute;
mod error;
pub mod math;
pub mod snapshot;
pub mod tensor;

pub use error::{Error, Result};
pub use math::{Profile, Shape, Window};
pub use tensor::*;
