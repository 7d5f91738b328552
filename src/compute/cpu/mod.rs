//! The operations on the CPU: vectorised for the machine at hand, split over rayon's threads.
//!
//! Every element is computed on its own, in one fixed order of operations, so results depend neither on the number of
//! threads nor on how the work is cut. Loops are plain Rust that the compiler vectorises under the widest instruction
//! set found at run time (`pulp`): AVX-512, AVX2 with FMA, NEON, or none. `f32::mul_add` is exact on all of them.

mod averages;
mod blend;
mod convert;
mod level;
#[doc(hidden)]
pub mod limits;
mod memory;
mod mode;
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
pub use scan::{Range, copy_and_scan, scan};
pub use update::{Incoming, update, update_with};

/// Elements that a thread takes at a time: large enough to hide the hand-over, small enough to balance.
pub const CHUNK: usize = 1 << 16;

/// Runs a loop compiled for the widest instruction set of this machine.
#[inline(always)]
pub(crate) fn vectorised<R>(body: impl FnOnce() -> R) -> R {
    SimdLevel::best().run(body)
}
