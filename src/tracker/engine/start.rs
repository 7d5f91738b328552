//! Choice of an engine by the devices of parameters and averages.

use std::path::Path;

#[cfg(feature = "cuda")]
use super::device::DeviceEngine;
use super::host::HostEngine;
#[cfg(feature = "cuda")]
use super::offloaded::OffloadedEngine;
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
        Device::Auto => config.bytes(layout) <= opened.memory()?.0 / AUTO_SHARE,
    };
    if on_device {
        Ok(Box::new(DeviceEngine::start(&opened, dir, layout, config)?))
    } else {
        Ok(Box::new(OffloadedEngine::start(&opened, dir, layout, config)?))
    }
}

/// Divisor of a device's free memory that gives the most for averages under [`Device::Auto`]; training needs the rest.
#[cfg(feature = "cuda")]
const AUTO_SHARE: usize = 4;
