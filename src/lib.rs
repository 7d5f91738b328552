//! Averages of network weights of any length, chosen after training: post-hoc EMA.
//!
//! While a network trains, [`PostHocEma`] tracks running averages of its parameters under two or more [`Profile`]s and
//! stores snapshots of them in a run's directory. Afterwards a [`Run`] solves for the weights with which the snapshots
//! blend into the average of any other profile ([`Plan`]) and writes the result, streamed, in bounded memory.
//! Karras et al. 2023, arXiv:2312.02696, section 3 and appendix C.
//!
//! ```
//! use posthoc_ema::{At, PostHocEma, Profile, Run};
//!
//! # let temp = tempfile::tempdir().unwrap();
//! # let dir = temp.path().join("ema");
//! let mut params = vec![("layer.weight", vec![0.0f32; 100])];
//! let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&params)?;
//! for step in 0..1000 {
//!     params[0].1.iter_mut().for_each(|w| *w += 1e-3 * step as f32); // the optimiser's step
//!     ema.update(&params)?;
//! }
//! ema.finish()?;
//!
//! let run = Run::open(&dir)?;
//! let plan = run.plan(Profile::sigma_rel(0.15)?, At::Latest)?;
//! assert!(plan.relative_error < 0.05);
//! run.write(&plan, temp.path().join("ema.safetensors"))?;
//! # Ok::<(), posthoc_ema::Error>(())
//! ```
//!
//! Features: `cli` (default) builds the command line and brings `report`, tables and plots for people and `bench`, which
//! measures the machine, and `import`, which reads the checkpoints of other tools. A library needs none of them:
//! `default-features = false`.

mod average;
#[cfg(feature = "report")]
pub mod bench;
#[doc(hidden)]
pub mod compute;
mod device;
mod error;
#[cfg(feature = "import")]
mod import;
pub mod math;
#[cfg(feature = "report")]
pub mod report;
pub mod snapshot;
pub mod sweep;
mod synthesis;
mod tensor;
mod tracker;

pub use average::{CheckpointWeight, Checkpoints, Merge};
pub use compute::cpu::Precision;
#[cfg(feature = "cuda")]
pub use compute::cuda::Fence;
pub use device::Device;
pub use error::{Error, Result};
#[cfg(feature = "import")]
pub use import::{Import, Imported, Tool};
pub use math::{Profile, Retention, Shape, Window};
pub use snapshot::TensorSpec;
pub use sweep::{SweepOptions, Swept};
pub use synthesis::{
    Advice, At, Forecast, Noise, Originals, Output, Plan, Predicted, Run, SwappedIn, Weight, Wish, Worst, WriteOptions,
    advise, cuda_devices,
};
pub use tensor::{
    CudaMemory, CudaMemoryMut, Dtype, Element, Memory, MemoryMut, Parameters, ParametersMut, Tensor, TensorView,
    TensorViewMut, Tensors, byte_size, is_averaged,
};
pub use tracker::{OnError, Options, PostHocEma, SavedState, Step, Verified, verify};

/// The examples of the README are compiled with the documentation's tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
