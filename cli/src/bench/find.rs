//! The devices that can be measured.

use posthoc_ema::{Device, Error, Result};

use super::cpu::Cpu;
use super::device::BenchDevice;

/// Devices that were found.
pub(super) struct Found {
    pub devices: Vec<Box<dyn BenchDevice>>,
    /// Reason why `auto` found no CUDA device.
    pub without_cuda: Option<String>,
}

/// Finds the devices that `device` selects.
pub(super) fn find(device: Device) -> Result<Found> {
    let cpu: Box<dyn BenchDevice> = Box::new(Cpu);
    let (devices, without_cuda) = match device {
        Device::Cpu => (vec![cpu], None),
        Device::Cuda(_) | Device::AnyCuda => {
            let number = if let Device::Cuda(number) = device { number } else { 0 };
            let unusable = |why| Error::Setting {
                option: "device",
                reason: format!("cuda:{number}: {why}: choose cpu, or auto for all available devices"),
            };
            (cuda(Some(number)).map_err(unusable)?, None)
        }
        Device::Auto => match cuda(None) {
            Ok(found) => (std::iter::once(cpu).chain(found).collect(), None),
            Err(why) => (vec![cpu], Some(why)),
        },
    };
    Ok(Found { devices, without_cuda })
}

/// Opens the CUDA device of a number, or all of them. An error is the reason why there are none.
#[cfg(feature = "cuda")]
fn cuda(number: Option<usize>) -> std::result::Result<Vec<Box<dyn BenchDevice>>, String> {
    use posthoc_ema::compute::cuda;

    let count = cuda::devices().map_err(|why| why.to_string())?;
    let numbers = number.map_or(0..count, |number| number..number + 1);
    let open =
        |number| -> Result<Box<dyn BenchDevice>> { Ok(Box::new(super::cuda::Cuda(cuda::CudaDevice::open(number)?))) };
    numbers.map(open).collect::<Result<_>>().map_err(|error| error.to_string())
}

/// Returns the reason why the program finds no CUDA device.
#[cfg(not(feature = "cuda"))]
fn cuda(_number: Option<usize>) -> std::result::Result<Vec<Box<dyn BenchDevice>>, String> {
    Err("this program was built without the feature `cuda`".into())
}
