//! Engines, which hold, update and store the running averages.

mod averages;
#[cfg(feature = "cuda")]
mod background;
mod copy_buffer;
#[cfg(feature = "cuda")]
mod device;
mod host;
#[cfg(feature = "cuda")]
mod offloaded;
mod start;
#[cfg(feature = "cuda")]
mod worker;

use super::checkpoint_meta::{CheckpointMeta, Failure};
use super::registry::OrderedViews;
use crate::compute::cpu::Layout;
#[cfg(feature = "cuda")]
use crate::compute::cuda::{DeviceAverages, Fence};
use crate::error::{Error, Result};

pub(super) use averages::{AveragesGuard, HostAverages};
#[cfg(feature = "cuda")]
use device::DeviceEngine;
pub(super) use host::HostEngine;
#[cfg(feature = "cuda")]
use offloaded::OffloadedEngine;
pub(super) use start::{EngineConfig, model_device};

/// Averages of a tracker, with the means to update and to store them.
///
/// An engine works in the background if it can. It then copies the values it needs before the averages change, and
/// keeps an error until the tracker takes it.
pub(super) enum Engine {
    /// Averages in host memory, of parameters in host memory.
    Host(HostEngine),
    /// Averages on the device of the parameters.
    #[cfg(feature = "cuda")]
    Device(DeviceEngine),
    /// Averages in host memory, of parameters on a device.
    #[cfg(feature = "cuda")]
    Offloaded(OffloadedEngine),
}

impl Engine {
    /// Folds new parameters into the averages and copies the copied tensors. `weights` holds `1 - beta` of each
    /// profile.
    ///
    /// # Errors
    /// [`Error::Tensor`] for memory that this engine cannot reach, and [`Error::Cuda`]. No average has changed then.
    pub(super) fn fold(&mut self, views: &OrderedViews<'_, '_>, layout: &Layout, weights: &[f32]) -> Result<()> {
        match self {
            Engine::Host(host) => host.fold(views, layout, weights),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.fold(views, weights),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.fold(views, weights),
        }
    }

    /// Returns the values after the newest [`Engine::fold`], in host memory.
    ///
    /// # Errors
    /// [`Error::Cuda`] if they cannot be copied there.
    pub(super) fn values(&self) -> Result<AveragesGuard<'_>> {
        match self {
            Engine::Host(host) => Ok(AveragesGuard::Borrowed(host.values())),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.values().map(AveragesGuard::Owned),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.averages().map(AveragesGuard::Locked),
        }
    }

    /// Prepares for checkpoints in the background, so that slow allocations happen before the training begins.
    pub(super) fn prepare(&self) {
        match self {
            Engine::Host(host) => host.prepare(),
            // These copy beside the training.
            #[cfg(feature = "cuda")]
            Engine::Device(_) | Engine::Offloaded(_) => {}
        }
    }

    /// Stores the averages as they are now, before it returns.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) fn store(&self, meta: &CheckpointMeta) -> Result<(), Failure> {
        meta.store(&self.values().map_err(Failure::Files)?.values())
    }

    /// Starts to store the averages as they are now; [`Engine::flush`] waits for the end.
    ///
    /// # Errors
    /// [`Failure`] of this checkpoint only. A failure in the background is tried once more there, and
    /// [`Engine::take_error`] returns its error.
    pub(super) fn checkpoint(&mut self, meta: CheckpointMeta) -> Result<(), Failure> {
        match self {
            Engine::Host(host) => host.checkpoint(meta),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.checkpoint(meta),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.checkpoint(meta),
        }
    }

    /// Takes the first unreported error of the background.
    pub(super) fn take_error(&self) -> Option<Error> {
        match self {
            Engine::Host(host) => host.take_error(),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.background().take_error(),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.background().take_error(),
        }
    }

    /// Waits until all checkpoints are written, after a second try of one that failed.
    ///
    /// # Errors
    /// The first unreported error of the background.
    pub(super) fn flush(&self) -> Result<()> {
        match self {
            Engine::Host(host) => host.flush(),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.background().flush(),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.background().flush(),
        }
    }

    /// Waits until all checkpoints are written or given up; their errors are kept.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the writing thread has ended.
    pub(super) fn wait_idle(&self) -> Result<()> {
        match self {
            Engine::Host(host) => host.wait_idle(),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.background().wait_idle(),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.background().wait_idle(),
        }
    }

    /// Returns the newest step that [`Engine::checkpoint`] accepted and that could not be stored after all.
    pub(super) fn last_failed_step(&self) -> Option<u64> {
        match self {
            Engine::Host(host) => host.last_failed_step(),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.background().last_failed_step(),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.background().last_failed_step(),
        }
    }

    /// Returns the fence that the parameters' owner waits for before it changes them.
    #[cfg(feature = "cuda")]
    pub(super) fn fence(&self) -> Option<&Fence> {
        match self {
            Engine::Offloaded(offloaded) => offloaded.fence(),
            _ => None,
        }
    }

    /// Returns the averages if they are on a device.
    #[cfg(feature = "cuda")]
    pub(super) fn on_device(&self) -> Option<&DeviceAverages> {
        match self {
            Engine::Device(device) => Some(device.averages()),
            _ => None,
        }
    }
}

/// Returns a view's memory on a device.
#[cfg(feature = "cuda")]
fn cuda_memory<'a>(view: &crate::tensor::TensorView<'a>) -> Result<crate::tensor::CudaMemory<'a>> {
    match view.memory {
        crate::tensor::Memory::Cuda(memory) => Ok(memory),
        crate::tensor::Memory::Host(_) => Err(Error::changed(
            view.name,
            crate::error::Difference::new("its memory", "on a CUDA device", "on the host"),
        )),
    }
}
