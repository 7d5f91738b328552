//! Where the running averages lie, and who updates and writes them.

mod averages;
#[cfg(feature = "cuda")]
mod background;
#[cfg(feature = "cuda")]
mod device;
mod host;
#[cfg(feature = "cuda")]
mod offloaded;
mod spare;
mod start;
#[cfg(feature = "cuda")]
mod worker;

use super::moment::{CheckpointMeta, Failure};
use super::table::OrderedViews;
use super::values::AveragesGuard;
use crate::compute::cpu::Layout;
#[cfg(feature = "cuda")]
use crate::compute::cuda::{DeviceAverages, Fence};
use crate::error::{Error, Result};

pub(super) use averages::HostAverages;
#[cfg(feature = "cuda")]
use device::DeviceEngine;
pub(super) use host::HostEngine;
#[cfg(feature = "cuda")]
use offloaded::OffloadedEngine;
pub(super) use start::{EngineConfig, model_device};

/// The averages of a tracker, with what it takes to update and to store them.
///
/// An engine does its work in the background where it can. It then copies what it needs before the averages move on, and
/// keeps an error until the tracker asks for it.
pub(super) enum Engine {
    /// In host memory, as the parameters.
    Host(HostEngine),
    /// On the device of the parameters.
    #[cfg(feature = "cuda")]
    Device(DeviceEngine),
    /// In host memory, of parameters on a device.
    #[cfg(feature = "cuda")]
    Offloaded(OffloadedEngine),
}

impl Engine {
    /// Folds new parameters into the averages of every profile, with the weight `1 - beta` of each, and takes the new
    /// copies.
    ///
    /// # Errors
    /// [`Error::Tensor`] for memory that this engine cannot reach, [`Error::Cuda`]; no average has then changed.
    pub(super) fn fold(&mut self, matched: &OrderedViews<'_, '_>, layout: &Layout, weights: &[f32]) -> Result<()> {
        match self {
            Engine::Host(host) => host.fold(matched, layout, weights),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.fold(matched, weights),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.fold(matched, weights),
        }
    }

    /// The values after the newest [`Engine::fold`], in host memory.
    ///
    /// # Errors
    /// What keeps them from being brought there.
    pub(super) fn values(&self) -> Result<AveragesGuard<'_>> {
        match self {
            Engine::Host(host) => Ok(AveragesGuard::Borrowed(host.values())),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.values().map(AveragesGuard::Owned),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.averages().map(AveragesGuard::Locked),
        }
    }

    /// Gets ready for checkpoints in the background: what takes long is done before the training begins.
    pub(super) fn prepare(&self) {
        match self {
            Engine::Host(host) => host.prepare(),
            // Their copies are made beside the training.
            #[cfg(feature = "cuda")]
            Engine::Device(_) | Engine::Offloaded(_) => {}
        }
    }

    /// Stores the averages as they are now, before it returns.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) fn store(&self, moment: &CheckpointMeta) -> Result<(), Failure> {
        moment.store(&self.values().map_err(Failure::Files)?.values())
    }

    /// Sees to it that the averages will be stored as they are now: [`Engine::flush`] waits for that.
    ///
    /// # Errors
    /// [`Failure`], of this checkpoint alone. What fails in the background is tried once more there, and is told by
    /// [`Engine::take_error`].
    pub(super) fn checkpoint(&mut self, moment: CheckpointMeta) -> Result<(), Failure> {
        match self {
            Engine::Host(host) => host.checkpoint(moment),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.checkpoint(moment),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.checkpoint(moment),
        }
    }

    /// The first error of the background that was not told yet.
    pub(super) fn take_error(&self) -> Option<Error> {
        match self {
            Engine::Host(host) => host.take_error(),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.background().take_error(),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.background().take_error(),
        }
    }

    /// Waits until all checkpoints are written, tries the newest once more if it failed, and tells the first error that
    /// was not told yet.
    pub(super) fn flush(&self) -> Result<()> {
        match self {
            Engine::Host(host) => host.flush(),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.background().flush(),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.background().flush(),
        }
    }

    /// Waits until all checkpoints are written or given up; their errors are kept for who asks.
    ///
    /// # Errors
    /// A fault of the thread that writes.
    pub(super) fn wait_idle(&self) -> Result<()> {
        match self {
            Engine::Host(host) => host.wait_idle(),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.background().wait_idle(),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.background().wait_idle(),
        }
    }

    /// The newest step that was accepted by [`Engine::checkpoint`] and could not be stored after all.
    pub(super) fn last_failed_step(&self) -> Option<u64> {
        match self {
            Engine::Host(host) => host.last_failed_step(),
            #[cfg(feature = "cuda")]
            Engine::Device(device) => device.background().last_failed_step(),
            #[cfg(feature = "cuda")]
            Engine::Offloaded(offloaded) => offloaded.background().last_failed_step(),
        }
    }

    /// What the parameters' owner waits for before it changes them.
    #[cfg(feature = "cuda")]
    pub(super) fn fence(&self) -> Option<&Fence> {
        match self {
            Engine::Offloaded(offloaded) => offloaded.fence(),
            _ => None,
        }
    }

    /// The averages, where they lie on a device.
    #[cfg(feature = "cuda")]
    pub(super) fn on_device(&self) -> Option<&DeviceAverages> {
        match self {
            Engine::Device(device) => Some(device.averages()),
            _ => None,
        }
    }
}

/// A view's memory on a device.
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
