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
//! By topic:
//!
//! * Training: [`PostHocEma`] and its [`Options`], with [`OnError`], [`Precision`], [`Retention`] and
//!   [`UpdateOutcome`].
//! * Tensors of a model: the traits [`Parameters`] and [`ParametersMut`], which lend [`TensorView`] and
//!   [`TensorViewMut`] in [`Memory`] of the host or a device, and [`Tensors`] with memory of their own.
//! * Models in parts on several processes: [`TensorView::as_part_of`], [`Options::manifest`], [`agree`] and
//!   [`Options::role`].
//! * Runs on disk: [`Run`], [`verify`], [`SavedState`], and the files themselves in [`snapshot`].
//! * Averages: a [`Profile`] at a time ([`At`]) becomes a [`Plan`], with [`Noise`] against rounding. [`Output`] and
//!   [`WriteOptions`] say where a result goes and which [`Device`] computes it. [`SwapGuard`] and [`SavedWeights`] put
//!   it into a model for a while.
//! * Before a training: [`Forecast`] of a [`Schedule`], and [`advise`].
//! * Many lengths, with one evaluation each: [`sweep`].
//! * Other checkpoints: [`Checkpoints`] averages raw ones. `Import` makes runs of those of other tools.
//!   `ImportAverages` makes runs of the averages that a training kept.
//! * The mathematics: [`math`].
//!
//! Features: `pytorch` reads PyTorch checkpoints (`.pt`) and imports those of other tools; `cuda` adds the CUDA
//! kernels. Neither is on by default. Features such as `cuda-13000` choose the version of CUDA's driver interface. The
//! command-line program is the crate `posthoc-ema-cli`.

mod checkpoint;
// Hidden, without a promise of stability: only benchmarks, tests and the program's `bench` use it.
#[doc(hidden)]
pub mod compute;
mod device;
mod error;
// Hidden, without a promise of stability: only the program uses it.
#[doc(hidden)]
pub mod fs;
#[cfg(feature = "pytorch")]
mod import;
pub mod math;
mod merge;
mod output;
mod planning;
#[cfg(feature = "pytorch")]
mod pytorch;
mod run;
pub mod snapshot;
pub mod sweep;
mod synthesis;
mod tensor;
mod tracker;

pub use checkpoint::{AdapterProduct, CheckpointOptions};
pub use compute::cpu::Precision;
#[cfg(feature = "cuda")]
pub use compute::cuda::{Fence, GraphStream};
pub use device::Device;
// Hidden: only the program uses it.
pub use error::{Difference, Error, Result};
#[doc(hidden)]
pub use error::{escape_controls, is_control, shown};
pub use fs::install_sigbus_handler;
#[cfg(feature = "pytorch")]
pub use import::{AverageDecay, FoundAverages, Import, ImportAverages, ImportReport, Tool};
pub use math::{Densities, EmaDecay, Family, History, Profile, Ramp, Retention, Schedule, Shape, Window};
pub use merge::{CheckpointWeight, Checkpoints, Merge, ProductErrors};
pub use output::{FormOptions, OutputForm, PartOutcome};
// Hidden: only the program and the Python package use them.
pub use math::noise::{MovementKind, NamedMovement};
pub use planning::{
    ACCURACY_LOG, Advice, AdviceRequest, At, Forecast, HeldBack, LARGE_ERROR, LaterTensors, MovementEvent,
    NoPrediction, Noise, Plan, PredictedError, Shortfall, Weight, WorstCase, WorstGroup, advise, log_warnings,
    warnings,
};
#[doc(hidden)]
pub use planning::{ADVICE_PARTS, rounding};
pub use run::{Run, SavedState, VerifyReport, verify};
pub use snapshot::{Snapshot, SnapshotId};
pub use sweep::{SweepOptions, SweepResult};
pub use synthesis::{Output, OutputPart, SavedWeights, SwapGuard, WriteOptions, cuda_devices, describe_cuda_devices};
pub use tensor::{
    CudaMemory, CudaMemoryMut, Dtype, Element, Memory, MemoryMut, Parameters, ParametersMut, Part, Tensor, TensorSpec,
    TensorView, TensorViewMut, Tensors, byte_size, is_averaged,
};
pub use tracker::{OnError, OnNonFinite, Options, PostHocEma, ShardManifest, ShardRole, UpdateOutcome, agree};

/// Compiles the examples of the README with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
