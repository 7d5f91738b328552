//! Choice of an engine by the devices of parameters and averages.

use std::path::Path;

#[cfg(feature = "cuda")]
use super::device::DeviceEngine;
use super::host::HostEngine;
#[cfg(feature = "cuda")]
use super::offloaded::{DeviceCopy, OffloadedEngine};
use super::{Engine, EngineConfig};
use crate::compute::cpu::Layout;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::{Memory, TensorView};

/// Returns the number of the model's CUDA device; none for the host.
///
/// # Errors
/// [`Error::Tensor`] if the model is spread over the host and a device, or over several devices.
pub(in crate::tracker) fn model_device<'v, 'a: 'v>(
    mut views: impl Iterator<Item = &'v TensorView<'a>>,
) -> Result<Option<usize>> {
    let Some(first) = views.next() else { return Ok(None) };
    match views.find(|view| device_of(view) != device_of(first)) {
        Some(other) => {
            let reason = format!(
                "it is {}, but `{}` is {}: move the model to one device, or leave out the tensors of one of them",
                place_name(device_of(other)),
                first.name,
                place_name(device_of(first))
            );
            Err(Error::tensor(other.name, reason))
        }
        None => Ok(device_of(first)),
    }
}

fn device_of(view: &TensorView<'_>) -> Option<usize> {
    match view.memory {
        Memory::Host(_) => None,
        Memory::Cuda(memory) => Some(memory.device),
    }
}

fn place_name(device: Option<usize>) -> String {
    device.map_or("in host memory".to_owned(), |number| format!("on cuda:{number}"))
}

/// Starts the engine for parameters on `model_device` (none for the host) with averages on `device`.
///
/// # Errors
/// [`Error::Setting`] for a device that cannot keep the averages of these parameters, [`Error::Io`] and
/// [`Error::Cuda`].
pub(in crate::tracker) fn start(
    dir: &Path,
    layout: &Layout,
    model_device: Option<usize>,
    device: Device,
    config: EngineConfig,
) -> Result<Box<dyn Engine>> {
    match (model_device, device) {
        (None, Device::Cuda(_) | Device::AnyCuda) => {
            let reason = format!("the parameters are in host memory: averages on {device} need them there too");
            Err(Error::Setting { option: "device", reason })
        }
        (None, _) => Ok(Box::new(HostEngine::new(config.host(layout)))),
        (Some(number), _) => start_for_device(dir, layout, number, device, config),
    }
}

#[cfg(not(feature = "cuda"))]
fn start_for_device(_: &Path, _: &Layout, number: usize, _: Device, _: EngineConfig) -> Result<Box<dyn Engine>> {
    let reason = format!("the parameters are on cuda:{number}, and this build has no CUDA: build with feature `cuda`");
    Err(Error::Setting { option: "device", reason })
}

#[cfg(feature = "cuda")]
fn start_for_device(
    dir: &Path,
    layout: &Layout,
    number: usize,
    device: Device,
    config: EngineConfig,
) -> Result<Box<dyn Engine>> {
    let opened = crate::compute::cuda::CudaDevice::open(number)?;
    let on_device = match device {
        Device::Cpu => false,
        Device::AnyCuda => true,
        Device::Cuda(wanted) if wanted == number => true,
        Device::Cuda(wanted) => {
            let reason = format!("the parameters are on cuda:{number}: averages cannot be kept on cuda:{wanted}");
            return Err(Error::Setting { option: "device", reason });
        }
        Device::Auto => fits_beside_training(&opened, layout, config.bytes(layout))?,
    };
    if on_device {
        Ok(Box::new(DeviceEngine::start(&opened, dir, layout, config)?))
    } else {
        let parameters: usize = config.averaged.iter().chain(&config.copied).sum();
        let device_copy = match config.device_copy {
            None if fits_beside_training(&opened, layout, parameters)? => DeviceCopy::IfPossible,
            None | Some(false) => DeviceCopy::Never,
            Some(true) => DeviceCopy::Always,
        };
        Ok(Box::new(OffloadedEngine::start(&opened, dir, layout, config, device_copy)?))
    }
}

/// Returns true if memory on a device leaves enough for the training, which may not have begun.
///
/// It may take a quarter of the free memory that is left after a gradient and two moments in f32 for each parameter.
#[cfg(feature = "cuda")]
fn fits_beside_training(device: &crate::compute::cuda::CudaDevice, layout: &Layout, bytes: usize) -> Result<bool> {
    const TRAINING: usize = 12;
    const SHARE: usize = 4;
    let free = device.memory()?.0.saturating_sub(TRAINING * layout.total());
    Ok(bytes <= free / SHARE)
}
