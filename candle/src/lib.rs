//! [Post-hoc EMA](posthoc_ema) for candle: a [`VarMap`](candle_nn::VarMap), or named tensors and variables of any
//! origin, as [`Parameters`](posthoc_ema::Parameters).
//!
//! Each type borrows what it wraps, so a new one is made for every call. Elements are read and written in place: in CPU
//! memory, and with the feature `cuda` also on CUDA devices, in the order of the stream that candle uses.
//!
//! ```
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
//! use posthoc_ema::{PostHocEma, Profile};
//! use posthoc_ema_candle::Variables;
//!
//! # let dir = tempfile::tempdir()?;
//! # let dir = dir.path().join("ema");
//! let vars = VarMap::new();
//! let layer = candle_nn::linear(4, 2, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
//! let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.01)?;
//! let mut ema = PostHocEma::options(&dir).sigma_rels([0.05, 0.28]).create(&Variables(&vars))?;
//!
//! let x = Tensor::ones((8, 4), DType::F32, &Device::Cpu)?;
//! for _ in 0..100 {
//!     optimizer.backward_step(&layer.forward(&x)?.sqr()?.mean_all()?)?;
//!     ema.update(&Variables(&vars))?;
//! }
//!
//! // The layer now holds its average, from which training may continue.
//! ema.switch_to(Profile::sigma_rel(0.15)?, &mut Variables(&vars))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod host;
mod named;
mod read;
mod write;

pub use named::{NamedTensors, NamedVars, Variables};
