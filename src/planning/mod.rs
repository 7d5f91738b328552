//! Planning of syntheses: plans, forecasts before training, advice and predicted errors.

mod advise;
mod density;
mod expected_noise;
mod forecast;
mod groups;
mod later;
mod movement_groups;
mod no_prediction;
mod noise;
mod plan;
mod sample;
mod segments;
mod shortfall;
mod source;
mod stored_chain;
mod stored_noise;
mod warnings;

#[doc(hidden)]
pub use advise::{ADVICE_PARTS, rounding};
pub use advise::{Advice, AdviceRequest, WorstCase, advise};
pub(crate) use density::densities;
pub(crate) use expected_noise::LikeNoise;
pub use forecast::Forecast;
pub(crate) use groups::{TensorGroup, groups_json, with_groups};
pub(crate) use later::{LaterGroup, solve_later};
pub use no_prediction::NoPrediction;
pub use noise::{HeldBack, MovementEvent, Noise, PredictedError, WorstGroup};
pub(crate) use plan::solve;
pub use plan::{At, LaterTensors, Plan, Weight};
pub(crate) use sample::{SampledElements, SampledSource};
pub(crate) use segments::Segment;
pub use shortfall::{LARGE_ERROR, Shortfall};
pub(crate) use source::IndexedSource;
#[cfg(feature = "pytorch")]
pub(crate) use stored_chain::history_json;
pub(crate) use stored_chain::{profile_json, read_chain};
pub(crate) use stored_noise::{ErrorSource, SnapshotNoise};
pub use warnings::{ACCURACY_LOG, log_warnings, warnings};
