//! Devices that blend, and the choice between them.

use super::streaming::Streaming;
use crate::device::Device;
use crate::error::Result;

/// Opened device.
pub(super) enum Backend {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<crate::compute::cuda::CudaDevice>),
}

impl Backend {
    /// Opens a device. [`Device::Auto`] opens the CPU.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for a CUDA device in a build without CUDA, and
    /// [`Error::Cuda`](crate::Error::Cuda) for one that cannot be used.
    pub(super) fn open(device: Device) -> Result<Backend> {
        match device {
            Device::Auto | Device::Cpu => Ok(Backend::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => crate::compute::cuda::CudaDevice::open(number).map(Backend::Cuda),
            #[cfg(feature = "cuda")]
            Device::AnyCuda => crate::compute::cuda::CudaDevice::open(0).map(Backend::Cuda),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) | Device::AnyCuda => {
                let reason = format!("this program was built without CUDA and cannot use {device}: use the CPU");
                Err(crate::Error::Setting { option: "device", reason })
            }
        }
    }

    /// Device that was opened.
    pub(super) fn device(&self) -> Device {
        match self {
            Backend::Cpu => Device::Cpu,
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => Device::Cuda(device.number()),
        }
    }
}

/// Checks that a device can be used, before any file is created, and returns it. [`Device::Auto`] becomes the CPU.
///
/// # Errors
/// [`Error::Setting`](crate::Error::Setting) or [`Error::Cuda`](crate::Error::Cuda) if this build or this machine lacks
/// it.
pub(crate) fn check_device(device: Device) -> Result<Device> {
    Backend::open(device).map(|backend| backend.device())
}

/// Counts the CUDA devices that can be used.
///
/// # Errors
/// Returns the reason if CUDA cannot be used: no driver or one that is too old, no device, or a build without the
/// feature `cuda`.
pub fn cuda_devices() -> Result<usize, String> {
    #[cfg(feature = "cuda")]
    return crate::compute::cuda::devices().map_err(|why| why.to_string());
    #[cfg(not(feature = "cuda"))]
    Err("this program was built without the feature `cuda`".into())
}

/// Describes each CUDA device: its product name, the CUDA version of the driver, and the code of the kernels that it
/// runs. No device is opened, which would take memory of it.
///
/// # Errors
/// Returns the reason if CUDA cannot be used, as [`cuda_devices`] does.
pub fn describe_cuda_devices() -> Result<Vec<String>, String> {
    let count = cuda_devices()?;
    #[cfg(feature = "cuda")]
    let describe = |number| crate::compute::cuda::describe(number).map_err(|why| why.to_string());
    #[cfg(not(feature = "cuda"))]
    let describe = |number: usize| Ok(format!("cuda:{number}"));
    (0..count).map(describe).collect()
}

/// Opens the device of a pass. For [`Device::Auto`], it is the one that is faster in a trial on the pass's own data.
pub(super) fn choose(streaming: &Streaming<'_>, wanted: Device) -> Result<Backend> {
    #[cfg(feature = "cuda")]
    if wanted == Device::Auto {
        return trial::faster(streaming);
    }
    let _ = streaming;
    Backend::open(wanted)
}

#[cfg(feature = "cuda")]
mod trial {
    use std::time::Instant;

    use super::{Backend, Result, Streaming};
    use crate::compute::cuda::{Blender, CudaDevice, devices};

    /// Bytes of sources and results in a trial, which takes a few hundredths of a second.
    const TRIAL_BYTES: usize = 256 << 20;

    /// Bytes from which the duration of the job is estimated first. Most jobs are too short for a trial.
    const ESTIMATE_BYTES: usize = 16 << 20;

    /// Seconds until a CUDA device is ready. A shorter job is done on the CPU by then.
    const STARTUP_SECONDS: f64 = 0.75;

    /// Times the CPU and the first CUDA device on the beginning of the job, and opens the faster one. A device that
    /// fails is not chosen.
    pub(super) fn faster(streaming: &Streaming<'_>) -> Result<Backend> {
        let elements = streaming.elements();
        let elements_in = |bytes: usize| elements.min(bytes / streaming.bytes_per_element().max(1)).max(1);
        if devices().is_err() || elements == 0 {
            return Ok(Backend::Cpu);
        }
        // Estimates the seconds of the whole job from a part of it. The second run counts: the first one may read from
        // a disk, which would count against the CPU alone.
        let seconds = |part: usize, run: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            run()?;
            let start = Instant::now();
            run()?;
            Ok(start.elapsed().as_secs_f64() * elements as f64 / part as f64)
        };
        let on_cpu = |part| seconds(part, &mut || streaming.try_cpu(part));
        if on_cpu(elements_in(ESTIMATE_BYTES))? < STARTUP_SECONDS {
            return Ok(Backend::Cpu);
        }
        let part = elements_in(TRIAL_BYTES);
        let cpu = on_cpu(part)?;
        let on_device = CudaDevice::open(0).and_then(|device| {
            let mut blender = Blender::new(&device)?;
            Ok((seconds(part, &mut || streaming.try_on(&mut blender, part))?, device.clone()))
        });
        match on_device {
            Ok((cuda, device)) if cuda < cpu => Ok(Backend::Cuda(device)),
            Ok(_) => Ok(Backend::Cpu),
            Err(error) => {
                tracing::warn!("blending on the CPU, as the CUDA device failed: {error}");
                Ok(Backend::Cpu)
            }
        }
    }
}
