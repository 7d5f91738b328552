//! Choice of an engine by the devices of parameters and averages.

use std::path::Path;

#[cfg(feature = "cuda")]
use super::device::DeviceEngine;
use super::host::HostEngine;
#[cfg(feature = "cuda")]
use super::offloaded::{OffloadedEngine, fits_beside_training};
use super::places::common_place;
#[cfg(feature = "cuda")]
use super::spread::SpreadEngine;
#[cfg(feature = "cuda")]
use super::spread_averages::SpreadShape;
use super::{Engine, EngineConfig};
use crate::compute::cpu::Layout;
use crate::device::Device;
use crate::error::{Error, Result};

/// Starts the engine for parameters in these places (numbers of CUDA devices, none for the host), with averages on
/// `device`.
///
/// # Errors
/// [`Error::Setting`] for a device that cannot keep the averages of these parameters, [`Error::Io`] and
/// [`Error::Cuda`].
pub(in crate::tracker) fn start(
    dir: &Path,
    layout: &Layout,
    places: &[Option<usize>],
    device: Device,
    config: EngineConfig,
) -> Result<Box<dyn Engine>> {
    match (common_place(places), device) {
        (Some(None), Device::Cuda(_) | Device::AnyCuda) => {
            let reason = format!("the parameters are in host memory: averages on {device} need them there too");
            Err(Error::Setting { option: "device", reason })
        }
        (Some(None), _) => Ok(Box::new(HostEngine::new(config.host(layout)))),
        (Some(Some(number)), _) => start_for_device(dir, layout, number, device, config),
        (None, _) => start_spread(dir, layout, places, device, config),
    }
}

#[cfg(not(feature = "cuda"))]
fn start_for_device(_: &Path, _: &Layout, number: usize, _: Device, _: EngineConfig) -> Result<Box<dyn Engine>> {
    let reason = format!("the parameters are on cuda:{number}, and this build has no CUDA: build with feature `cuda`");
    Err(Error::Setting { option: "device", reason })
}

#[cfg(not(feature = "cuda"))]
fn start_spread(
    dir: &Path,
    layout: &Layout,
    places: &[Option<usize>],
    device: Device,
    config: EngineConfig,
) -> Result<Box<dyn Engine>> {
    start_for_device(dir, layout, places.iter().flatten().next().copied().unwrap_or(0), device, config)
}

/// Starts the engine for a model in several places.
#[cfg(feature = "cuda")]
fn start_spread(
    dir: &Path,
    layout: &Layout,
    places: &[Option<usize>],
    device: Device,
    config: EngineConfig,
) -> Result<Box<dyn Engine>> {
    let shape = SpreadShape::new(places, layout, &config);
    let beside = match device {
        Device::Cpu => false,
        Device::AnyCuda => true,
        Device::Cuda(wanted) => {
            let devices = shape.device_bytes(&config).into_iter().map(|(number, ..)| format!("cuda:{number}"));
            let host = places.contains(&None).then(|| "the host".to_owned());
            let listed: Vec<String> = devices.chain(host).collect();
            let reason = format!(
                "the parameters are on {}: averages cannot all be kept on cuda:{wanted}. Choose cuda, which keeps each \
                 tensor's beside it, or cpu",
                listed.join(", ")
            );
            return Err(Error::Setting { option: "device", reason });
        }
        Device::Auto => {
            let mut fits = true;
            for (number, elements, bytes) in shape.device_bytes(&config) {
                let opened = crate::compute::cuda::CudaDevice::open(number)?;
                fits &= fits_beside_training(&opened, elements, bytes)?;
            }
            fits
        }
    };
    if beside {
        Ok(Box::new(SpreadEngine::start(dir, shape, config)?))
    } else {
        Ok(Box::new(OffloadedEngine::start(dir, layout, places, config)?))
    }
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
        Device::Auto => fits_beside_training(&opened, layout.total(), config.bytes(layout))?,
    };
    if on_device {
        Ok(Box::new(DeviceEngine::start(&opened, dir, layout, config)?))
    } else {
        let places = vec![Some(number); config.averaged.len() + config.copied.len()];
        Ok(Box::new(OffloadedEngine::start(dir, layout, &places, config)?))
    }
}
