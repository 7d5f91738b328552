//! Where a job is blended.

use super::streaming::Streaming;
use crate::device::Device;
use crate::error::Result;

/// A device that is ready.
pub(super) enum Backend {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<crate::compute::cuda::CudaDevice>),
}

impl Backend {
    /// The device that was asked for, or the CPU where the choice is free.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for a CUDA device in a build without, [`Error::Cuda`](crate::Error::Cuda) for one that cannot be used.
    pub(super) fn asked(device: Device) -> Result<Backend> {
        match device {
            Device::Auto | Device::Cpu => Ok(Backend::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => crate::compute::cuda::CudaDevice::open(number).map(Backend::Cuda),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => {
                let reason = format!("this program was built without CUDA and cannot use {device}: use the CPU");
                Err(crate::Error::Setting { option: "device", reason })
            }
        }
    }

    /// What a caller is told.
    pub(super) fn device(&self) -> Device {
        match self {
            Backend::Cpu => Device::Cpu,
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => Device::Cuda(device.number()),
        }
    }
}

/// Checks that a device can be used, before any file is made, and returns it; the CPU where the choice is free.
///
/// # Errors
/// As [`WriteOptions::device`](super::WriteOptions::device) asks for one that this build or this machine lacks.
pub(crate) fn check_device(device: Device) -> Result<Device> {
    Backend::asked(device).map(|chosen| chosen.device())
}

/// The number of CUDA devices that can be used.
///
/// # Errors
/// Why there is none: no driver, one too old, no device, or a build without the feature `cuda`.
pub fn cuda_devices() -> Result<usize, String> {
    #[cfg(feature = "cuda")]
    return crate::compute::cuda::devices().map_err(|why| why.to_string());
    #[cfg(not(feature = "cuda"))]
    Err("this program was built without the feature `cuda`".into())
}

/// Decides where a pass is blended: where it was asked for, or where a trial on its own data is faster.
pub(super) fn choose(streaming: &Streaming<'_>, wanted: Device) -> Result<Backend> {
    #[cfg(feature = "cuda")]
    if wanted == Device::Auto {
        return trial::faster(streaming);
    }
    let _ = streaming;
    Backend::asked(wanted)
}

#[cfg(feature = "cuda")]
mod trial {
    use std::time::Instant;

    use super::{Backend, Result, Streaming};
    use crate::compute::cuda::{Blender, CudaDevice, devices};

    /// Bytes of sources and results that a trial takes: some hundredths of a second.
    const BYTES: usize = 256 << 20;

    /// Bytes from which the length of the whole job is guessed first: most jobs need no trial.
    const GLANCE: usize = 16 << 20;

    /// Below this time in seconds, a job is done before a device is ready.
    const SHORT: f64 = 0.75;

    /// Tries both on the beginning of the job. A device that fails the trial is not chosen.
    pub(super) fn faster(streaming: &Streaming<'_>) -> Result<Backend> {
        let elements = streaming.elements();
        let part = |bytes: usize| elements.min(bytes / streaming.bytes_per_element().max(1)).max(1);
        if devices().is_err() || elements == 0 {
            return Ok(Backend::Cpu);
        }
        // The second time: what the first one fetched from a disk would count for the CPU alone.
        let seconds = |some: usize, run: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            run()?;
            let start = Instant::now();
            run()?;
            Ok(start.elapsed().as_secs_f64() * elements as f64 / some as f64)
        };
        let on_cpu = |some| seconds(some, &mut || streaming.try_cpu(some));
        if on_cpu(part(GLANCE))? < SHORT {
            return Ok(Backend::Cpu);
        }
        let some = part(BYTES);
        let cpu = on_cpu(some)?;
        let on_device = CudaDevice::open(0).and_then(|device| {
            let mut blender = Blender::new(&device)?;
            Ok((seconds(some, &mut || streaming.try_on(&mut blender, some))?, device.clone()))
        });
        match on_device {
            Ok((cuda, device)) if cuda < cpu => Ok(Backend::Cuda(device)),
            Ok(_) => Ok(Backend::Cpu),
            Err(error) => {
                tracing::warn!("blending on the CPU: {error}");
                Ok(Backend::Cpu)
            }
        }
    }
}
