//! Engines, which hold, update and store the running averages.

mod averages;
#[cfg(any(test, feature = "cuda"))]
pub(super) mod background;
mod config;
mod copy_buffer;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod gathered_copies;
mod host;
#[cfg(feature = "cuda")]
mod offloaded;
mod places;
#[cfg(feature = "cuda")]
mod spread;
#[cfg(feature = "cuda")]
mod spread_averages;
mod start;

use std::any::Any;

use super::checkpoint_meta::{CheckpointMeta, Failure};
use super::registry::OrderedViews;
use super::writer::Pending;
use crate::compute::cpu::{Layout, UpdateWeights};
#[cfg(feature = "cuda")]
use crate::compute::cuda::{DeviceAverages, Fence};
use crate::error::{Error, Result};
use crate::tensor::NonFiniteElement;
#[cfg(feature = "cuda")]
use crate::tensor::{CudaMemory, Dtype, Memory, TensorView};

pub(super) use averages::AveragesGuard;
pub(super) use config::EngineConfig;
#[cfg(test)]
pub(super) use host::HostEngine;
pub(super) use places::places;
#[cfg(feature = "cuda")]
pub(super) use spread_averages::SpreadAverages;
pub(super) use start::start;

/// Averages of a tracker, with the means to update and to store them.
///
/// An engine works in the background if it can. It then copies the values it needs before the averages change, and
/// keeps an error until the tracker takes it.
pub(super) trait Engine: Any + Send + Sync {
    /// Folds new parameters into the averages and copies the copied tensors. With `looks`, it changes
    /// nothing if an averaged tensor has NaN or infinity.
    ///
    /// # Errors
    /// [`Error::Tensor`] or [`Error::Changed`] for memory that this engine cannot reach, and [`Error::Cuda`]. No
    /// average has changed then.
    fn fold(
        &mut self,
        views: &OrderedViews<'_, '_>,
        layout: &Layout,
        weights: UpdateWeights<'_>,
        looks: bool,
    ) -> Result<()>;

    /// Waits for the look of the newest [`Engine::fold`], and returns the first element for which it changed nothing.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the parameters could not be looked at.
    fn refused(&self) -> Result<Option<NonFiniteElement>>;

    /// Returns true if [`Engine::refused`] waits for a device.
    fn looks_later(&self) -> bool {
        false
    }

    /// Returns the values after the newest [`Engine::fold`], in host memory.
    ///
    /// # Errors
    /// [`Error::Cuda`] if they cannot be copied there.
    fn values(&self) -> Result<AveragesGuard<'_>>;

    /// Prepares for checkpoints in the background, so that slow allocations happen before the training begins.
    fn prepare(&self) {}

    /// Stores the averages as they are now, before it returns.
    ///
    /// # Errors
    /// [`Failure`].
    fn store(&self, meta: &CheckpointMeta) -> Result<(), Failure> {
        meta.store(&self.values().map_err(Failure::Files)?.values())
    }

    /// Starts to store the averages as they are now; [`Engine::flush`] waits for the end.
    ///
    /// # Errors
    /// [`Failure`] of this checkpoint only. A failure in the background is tried once more there, and
    /// [`Engine::take_error`] returns its error.
    fn checkpoint(&mut self, meta: CheckpointMeta) -> Result<(), Failure>;

    /// Returns the checkpoints in the background; none before the first.
    fn pending(&self) -> Option<&dyn Pending>;

    /// Takes the first unreported error of the background.
    fn take_error(&self) -> Option<Error> {
        self.pending().and_then(Pending::take_error)
    }

    /// Waits until all checkpoints are written, after a second try of one that failed.
    ///
    /// # Errors
    /// The first unreported error of the background.
    fn flush(&self) -> Result<()> {
        self.pending().map_or(Ok(()), Pending::flush)
    }

    /// Waits until all checkpoints are written or given up; their errors are kept.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the writing thread has ended.
    fn wait_idle(&self) -> Result<()> {
        self.pending().map_or(Ok(()), Pending::wait_idle)
    }

    /// Returns the newest step that [`Engine::checkpoint`] accepted and that could not be stored after all.
    fn last_failed_step(&self) -> Option<u64> {
        self.pending().and_then(Pending::last_failed_step)
    }

    /// Describes the memory of the averages, and the way of the parameters to it.
    fn placement(&self) -> String {
        "averages in host memory, beside the parameters".into()
    }

    /// Returns true if the fence spares the training a wait for the bus.
    #[cfg(feature = "cuda")]
    fn needs_fence(&self) -> bool {
        false
    }

    /// Returns the fence that the parameters' owner waits for before it changes them.
    #[cfg(feature = "cuda")]
    fn fence(&self) -> Option<&Fence> {
        None
    }

    /// Returns the averages if they are on a device.
    #[cfg(feature = "cuda")]
    fn on_device(&self) -> Option<&DeviceAverages> {
        None
    }

    /// Returns the averages if they are in several places.
    #[cfg(feature = "cuda")]
    fn spread(&self) -> Option<&SpreadAverages> {
        None
    }

    /// Returns the averages for a capture or a replay of an update. If it is due, no checkpoint reads them any more.
    ///
    /// # Errors
    /// [`Error::Setting`] if they are not on the device.
    #[cfg(feature = "cuda")]
    fn in_graphs(&mut self, _is_due: bool) -> Result<&mut DeviceAverages> {
        let reason = "an update in a CUDA graph needs the averages on the model's device, and they are in host memory: \
                      make the tracker with device \"cuda\", or update between the replays of the graph";
        Err(Error::Setting { option: "device", reason: reason.into() })
    }
}

/// Returns a view's memory on a device.
#[cfg(feature = "cuda")]
fn cuda_memory<'a>(view: &TensorView<'a>) -> Result<CudaMemory<'a>> {
    match view.memory {
        Memory::Cuda(memory) => Ok(memory),
        Memory::Host(_) => Err(Error::changed(
            view.name,
            crate::error::Difference::new("the tensor", "on a CUDA device", "in host memory"),
        )),
    }
}

/// Averaged tensors with their dtypes, and copied ones.
#[cfg(feature = "cuda")]
type CudaTensors<'a> = (Vec<(Dtype, CudaMemory<'a>)>, Vec<CudaMemory<'a>>);

/// Returns the memory of all tensors on a device.
#[cfg(feature = "cuda")]
pub(super) fn cuda_tensors<'a>(views: &OrderedViews<'_, 'a>) -> Result<CudaTensors<'a>> {
    let averaged = views.averaged.iter().map(|view| Ok((view.dtype, cuda_memory(view)?))).collect::<Result<_>>()?;
    let copied = views.copied.iter().map(|view| cuda_memory(view)).collect::<Result<_>>()?;
    Ok((averaged, copied))
}
