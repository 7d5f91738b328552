//! Choice of an engine by the devices of parameters and averages.

use std::path::Path;

use super::Engine;
use super::averages::HostAverages;
#[cfg(feature = "cuda")]
use super::device::DeviceEngine;
use super::host::HostEngine;
#[cfg(feature = "cuda")]
use super::offloaded::OffloadedEngine;
use crate::compute::cpu::{Averages, Layout, Precision};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::run::Settings;
use crate::tensor::{Memory, TensorView};
use crate::tracker::registry::TensorRegistry;

/// Sizes and initial values of an engine.
pub(in crate::tracker) struct EngineConfig {
    pub profiles: usize,
    pub precision: Precision,
    /// Sizes in bytes of the averaged tensors.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only staging needs them"))]
    pub averaged: Vec<usize>,
    /// Sizes in bytes of the copied tensors.
    pub copied: Vec<usize>,
    /// Averages and copies of a resumed run.
    pub values: Option<(Vec<Averages>, Vec<Vec<u8>>)>,
}

impl EngineConfig {
    pub(in crate::tracker) fn new(registry: &TensorRegistry, settings: &Settings) -> EngineConfig {
        EngineConfig {
            profiles: settings.profiles.len(),
            precision: settings.precision,
            averaged: registry.averaged().iter().map(|entry| entry.bytes).collect(),
            copied: registry.copied().iter().map(|entry| entry.bytes).collect(),
            values: None,
        }
    }

    /// Allocates the averages in host memory: those of a resumed run, or zeros, which the first update replaces.
    pub(super) fn host(self, layout: &Layout) -> HostAverages {
        let (averages, copies) = self.values.unwrap_or_else(|| {
            let averages = vec![Averages::zeros(layout, self.precision); self.profiles];
            (averages, self.copied.iter().map(|&bytes| vec![0; bytes]).collect())
        });
        HostAverages::new(averages, copies)
    }
}

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
        (None, Device::Cuda(number)) => {
            let reason = format!("the parameters are in host memory: averages on cuda:{number} need them there too");
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

#[cfg(feature = "cuda")]
impl EngineConfig {
    /// Returns the bytes of memory that the averages take.
    fn bytes(&self, layout: &Layout) -> usize {
        let each = if self.precision == Precision::Compensated { 6 } else { 4 };
        self.profiles * layout.total() * each + self.copied.iter().sum::<usize>()
    }
}
