//! Synthesis of solved plans: into files, into memory, or into a live model.

mod backend;
mod blend;
#[cfg(feature = "cuda")]
mod device_blocks;
mod files;
mod infinities;
mod live_model;
mod load;
mod load_into;
#[cfg(feature = "cuda")]
mod on_device;
mod options;
mod part;
mod prefetch;
mod progress;
mod source_set;
mod streaming;
mod swap;
mod transfer;
mod write;

pub(crate) use backend::check_device;
pub use backend::{cuda_devices, describe_cuda_devices};
pub(crate) use files::{FileHeader, OutputFile, ShardTensor, Shards};
pub(crate) use options::MAX_TARGETS;
pub use options::{Output, WriteOptions};
pub use part::OutputPart;
pub(crate) use source_set::{
    ComputedSources, Elements, LaterSelection, ModelTensor, Selection, SourceSet, TensorSource, WeightedSources,
};
pub use swap::{SavedWeights, SwapGuard};
pub(crate) use write::{check_distinct, metadata};
