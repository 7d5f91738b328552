//! From a plan to weights: solved for a run's snapshots, streamed to files, into memory or into a live model.

mod advise;
mod ahead;
mod blend;
mod choose;
mod density;
mod files;
mod fill;
mod forecast;
mod noise;
#[cfg(feature = "cuda")]
mod on_device;
mod output;
mod plan;
mod pool;
mod run;
mod stored;
mod streaming;
mod swap;

#[cfg(feature = "report")]
pub(crate) use advise::rounding;
pub use advise::{Advice, Wish, Worst, advise};
pub use choose::cuda_devices;
pub use forecast::Forecast;
pub use noise::{Noise, Predicted};
pub use output::{Output, WriteOptions};
pub use plan::{At, Plan, Weight};
pub use run::Run;
pub use swap::{Originals, SwappedIn};

pub(crate) use choose::check_device;
pub(crate) use files::{Head, Shards};
pub(crate) use output::{MAX_TARGETS, check_distinct};
pub(crate) use plan::solve;
pub(crate) use pool::{Elements, Holder, Pool, PoolTensor, Selection, Source};
#[cfg(feature = "import")]
pub(crate) use stored::history_json;
pub(crate) use stored::profile_json;
#[cfg(all(test, feature = "import"))]
pub(crate) use stored::read_chain;

#[cfg(test)]
mod tests;
