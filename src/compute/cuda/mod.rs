//! Operations on CUDA devices, with the same bits as on the CPU.
//!
//! Every element undergoes the same operations in the same order, each rounded to nearest even. Only the payload of a
//! NaN differs, and no average with a NaN is ever stored.
//!
//! Without a driver nothing here panics: [`devices`] checks for it, and no other driver call is made before. A device
//! is used through its primary context, which PyTorch, candle and the CUDA runtime use too, so their memory and streams
//! can be borrowed. All work is ordered explicitly with events, and cudarc's own tracking is off.

mod arenas;
mod arrangement;
mod averages;
mod blender;
mod chunks;
mod device;
mod foreign;
mod graph;
mod kernels;
mod look;
mod memory;
mod offload;
mod pinned;
mod probe;
mod reader;
mod remedies;
mod replays;
mod staging;
mod timed_stream;

pub use averages::DeviceAverages;
pub use blender::{BlendInput, BlendPart, Blender, Deliver, Destination, OverflowHandler};
pub use device::CudaDevice;
pub use foreign::GraphStream;
pub use kernels::KernelCode;
pub use memory::Buffer;
pub use offload::{Fence, HostCopy, Offload, PendingCopy};
pub use pinned::{Pinned, check_host_memory};
pub use probe::{Unavailable, describe, devices};
pub use reader::AveragesReader;
pub use replays::ReplayEnd;
pub use staging::Staging;
pub use timed_stream::{BlendWorkspace, PinnedMemory, TimedStream};

pub use crate::tensor::{NonFiniteElement, ScatteredElements};
