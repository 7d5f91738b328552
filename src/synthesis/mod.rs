//! From a plan to weights: solved for a run's snapshots, streamed to files, into memory or into a live model.

mod blend;
mod forecast;
mod output;
mod plan;
mod pool;
mod run;
mod stored;
mod streaming;
mod swap;

pub use forecast::Forecast;
pub use output::{Output, WriteOptions};
pub use plan::{At, Plan, Weight};
pub use run::Run;
pub use swap::SwappedIn;

pub(crate) use plan::solve;
pub(crate) use pool::{Holder, Pool, PoolTensor, Source};
pub(crate) use stored::profile_json;

#[cfg(test)]
mod tests;
