//! From a plan to weights: streamed to files, into memory or into a live model.

mod backend;
mod blend;
mod files;
mod load_into;
#[cfg(feature = "cuda")]
mod on_device;
mod output;
mod prefetch;
mod source_set;
mod streaming;
mod swap;

pub(crate) use backend::check_device;
pub use backend::cuda_devices;
pub(crate) use files::{OutputFile, Shards};
pub(crate) use output::{MAX_TARGETS, check_distinct};
pub use output::{Output, WriteOptions};
pub(crate) use source_set::{Elements, ModelTensor, Selection, SourceSet, TensorSource};
pub use swap::{SavedWeights, SwapGuard};
