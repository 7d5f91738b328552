//! Devices that compute.

use std::fmt;
use std::str::FromStr;

/// Device to compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// Automatic choice. A synthesis uses the device that is faster for the job, a tracker keeps averages on the CUDA
    /// device if it has ample room, and a benchmark measures all devices.
    Auto,
    /// CPU.
    #[default]
    Cpu,
    /// CUDA device of this number.
    Cuda(usize),
    /// CUDA device of the parameters for a tracker, and the first one for a synthesis.
    AnyCuda,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(number) => write!(f, "cuda:{number}"),
            Device::AnyCuda => f.write_str("cuda"),
        }
    }
}

/// Parses `auto`, `cpu`, `cuda` ([`Device::AnyCuda`]) or `cuda:N`.
impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        match text {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::AnyCuda),
            other => match other.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
                Some(number) => Ok(Device::Cuda(number)),
                None => Err(format!("`{text}` is not a device: the devices are auto, cpu, cuda and cuda:N")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_and_from_str_round_trip() {
        for device in [Device::Auto, Device::Cpu, Device::Cuda(0), Device::Cuda(17), Device::AnyCuda] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(wrong.parse::<Device>().unwrap_err().contains("cuda:N"), "{wrong}");
        }
    }
}
