//! Operations on the CPU, vectorised for the instruction set of the machine and split over rayon's threads.
//!
//! Every element is computed independently, in one fixed order of operations. Results therefore depend neither on the
//! number of threads nor on the size of the chunks. Loops are plain Rust. The compiler vectorises them for each
//! instruction set, and the widest available one is chosen at run time: AVX-512, AVX2 with FMA, NEON, or none.
//! `f32::mul_add` rounds once on all of them.

#[cfg(test)]
mod accuracy;
mod averages;
mod blend;
mod convert;
mod fp_env;
mod level;
#[doc(hidden)]
pub mod limits;
pub mod low_order;
mod memory;
pub(crate) mod prefetch;
mod scan;
mod update;
mod x86;

pub use averages::{Averages, Layout, Precision, SpareAverages};
pub use blend::{Blend, Overflow, blend, blend_with};
pub use convert::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, max_finite, to_f32};
pub use level::SimdLevel;
pub use memory::Spare;
pub(crate) use memory::zeros;
pub use scan::{ValueRange, copy_and_scan, scan};
pub use update::{Incoming, UpdateWeights, update, update_with};

/// Number of elements per task: large enough to amortise scheduling, small enough to balance the threads.
pub const CHUNK: usize = 1 << 16;

/// Runs a loop that is compiled for the widest instruction set of this machine.
#[inline(always)]
pub(crate) fn vectorised<R>(body: impl FnOnce() -> R) -> R {
    SimdLevel::best().run(body)
}
