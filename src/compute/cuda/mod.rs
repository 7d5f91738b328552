//! The operations on CUDA devices, with the CPU's bits: every element goes through the same operations in the same order,
//! each rounded to nearest even. Only NaN differ, in their payload, and no average with a NaN is ever stored.
//!
//! Nothing here panics where there is no driver: [`devices`] asks first, and without it no other call is made.
//! A device is used through its primary context, the one that PyTorch, candle and the CUDA runtime use, so their memory
//! and streams are ours to borrow. Memory and streams are ordered by hand, with events: cudarc's own tracking is off.

mod averages;
mod blender;
mod chunks;
mod device;
mod kernels;
mod lent;
mod memory;
mod offload;
mod probe;
mod reader;
mod staging;
mod trial;

pub use averages::DeviceAverages;
pub use blender::{Blender, Deliver, Delivery, Input, Report, Stretch};
pub use device::Device;
pub use memory::{Buffer, Pinned};
pub use offload::{Fence, HostCopy, Offload, PendingCopy};
pub use probe::{Unavailable, devices};
pub use reader::Reader;
pub use staging::Staging;
pub use trial::{Locked, Sums, TimedStream};
