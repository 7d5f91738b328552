//! Check for a usable driver and the number of devices. It calls no function that the driver might lack.

use std::ffi::{c_int, c_uint};
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::{DriverError, result, sys};
use libloading::Library;

use super::KernelCode;
use super::remedies::{oldest_driver, remedy};
use crate::fs::driver_libraries;

/// Reason why no CUDA device can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// The machine has no driver.
    NoDriver,
    /// The driver's library lacks this function.
    Incomplete(&'static str),
    /// The driver is older than the kernels.
    TooOld {
        /// Newest CUDA version that the driver supports.
        driver: String,
        /// Oldest CUDA version that the kernels need.
        kernels: &'static str,
    },
    /// The driver does not start, with this error code.
    Refused(c_uint),
    /// The driver starts but finds no device.
    NoDevice,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unavailable::NoDriver => write!(
                f,
                "the machine has no NVIDIA driver ({}): install one; under WSL, on Windows; a container needs \
                 `--gpus all`",
                driver_libraries().join(", ")
            ),
            Unavailable::Incomplete(name) => {
                write!(f, "the NVIDIA driver lacks {name}: it is damaged or far too old: install a current one")
            }
            Unavailable::TooOld { driver, kernels } => write!(
                f,
                "the NVIDIA driver supports CUDA {driver}, the kernels need {kernels}: update it to version {} \
                 or later",
                oldest_driver(kernels)
            ),
            Unavailable::Refused(code) => {
                let remedy = remedy(*code).unwrap_or("check that nvidia-smi works");
                write!(f, "the NVIDIA driver does not start (error {code}): {remedy}")
            }
            Unavailable::NoDevice => {
                write!(f, "the NVIDIA driver finds no device: {}", remedy(100).unwrap_or_default())
            }
        }
    }
}

/// CUDA version of the compiler that built the kernels.
pub(super) const KERNELS: &str = match option_env!("POSTHOC_EMA_CUDA_VERSION") {
    Some(version) => version,
    None => "0.0",
};

/// Oldest CUDA version whose drivers run the kernels: by their PTX, and in a build without it by their machine code.
const OLDEST: &str = match option_env!("POSTHOC_EMA_CUDA_OLDEST") {
    Some(version) => version,
    None => "0.0",
};

/// Variable that makes every driver compile the PTX, for tests of that path.
const PTX_VARIABLE: &str = "POSTHOC_EMA_CUDA_PTX";

/// Driver functions that are called here or by cudarc, which panics if one is missing.
const NEEDED: [&str; 38] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemGetInfo_v2",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamIsCapturing",
    "cuThreadExchangeStreamCaptureMode",
    "cuUserObjectCreate",
    "cuGraphRetainUserObject",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
];

/// Returns the number of devices, which is at least 1. The driver is probed once per process.
///
/// # Errors
/// Returns the reason if no device can be used.
pub fn devices() -> Result<usize, Unavailable> {
    static DEVICES: OnceLock<Result<usize, Unavailable>> = OnceLock::new();
    DEVICES.get_or_init(probe).clone()
}

fn probe() -> Result<usize, Unavailable> {
    // SAFETY: loading the driver's library runs its initialisers, as in every CUDA program.
    let open = |name: &&str| unsafe { Library::new(*name) }.ok();
    let library = driver_libraries().iter().find_map(open).ok_or(Unavailable::NoDriver)?;
    for name in NEEDED {
        // SAFETY: the symbol is looked up but never called through this type.
        if unsafe { library.get::<*const ()>(name.as_bytes()) }.is_err() {
            return Err(Unavailable::Incomplete(name));
        }
    }
    // The driver does not survive being unloaded.
    std::mem::forget(library);
    // Called through cudarc, because its own search could find another library.
    // SAFETY: the library exists and has the function.
    let code = unsafe { sys::cuInit(0) } as c_uint;
    match code {
        0 => {}
        100 => return Err(Unavailable::NoDevice),
        code => return Err(Unavailable::Refused(code)),
    }
    check_version()?;
    let mut count: c_int = 0;
    // SAFETY: the driver is initialised, and the pointer is valid for the call.
    let code = unsafe { sys::cuDeviceGetCount(&raw mut count) } as c_uint;
    match (code, usize::try_from(count)) {
        (0, Ok(count)) if count > 0 => Ok(count),
        (0, _) => Err(Unavailable::NoDevice),
        (code, _) => Err(Unavailable::Refused(code)),
    }
}

/// Returns the product name of a device, the CUDA version of its driver, and the kind of the kernels' code. The device
/// is not opened, which would take memory of it.
///
/// # Errors
/// Returns the reason if no device can be used, or none of this number.
pub fn describe(number: usize) -> Result<String, Unavailable> {
    let count = devices()?;
    if number >= count {
        return Err(Unavailable::Refused(101));
    }
    let driver = DriverVersion::read()?;
    let refused = |error: DriverError| Unavailable::Refused(error.0 as c_uint);
    let device = result::device::get(number as c_int).map_err(refused)?;
    let name = result::device::get_name(device).map_err(refused)?;
    Ok(described(&name, driver))
}

/// Returns the words for a device.
pub(super) fn described(name: &str, driver: DriverVersion) -> String {
    format!("{name}, driver for CUDA {driver}, {}", driver.code())
}

/// Newest CUDA version that the driver supports.
#[derive(Clone, Copy, Debug)]
pub(super) struct DriverVersion(c_int);

impl DriverVersion {
    /// Asks the driver, which is initialised.
    pub(super) fn read() -> Result<DriverVersion, Unavailable> {
        let mut version: c_int = 0;
        // SAFETY: the driver is initialised, and the pointer is valid for the call.
        let code = unsafe { sys::cuDriverGetVersion(&raw mut version) } as c_uint;
        if code == 0 { Ok(DriverVersion(version)) } else { Err(Unavailable::Refused(code)) }
    }

    /// Returns true if the driver can keep memory for a graph (`cuStreamGetCaptureInfo_v3`).
    pub(super) fn keeps_memory_of_graphs(self) -> bool {
        self.0 >= 12_030
    }

    /// Returns the kernels' code that the driver takes: machine code needs its compiler's major version.
    pub(super) fn code(self) -> KernelCode {
        if self.0 / 1000 < major(KERNELS) || std::env::var_os(PTX_VARIABLE).is_some() {
            KernelCode::Ptx
        } else {
            KernelCode::Fatbin
        }
    }
}

impl fmt::Display for DriverVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

fn major(version: &str) -> c_int {
    version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
}

/// Checks that the driver supports the kernels' machine code or PTX.
fn check_version() -> Result<(), Unavailable> {
    let version = DriverVersion::read()?;
    if version.0 / 1000 < major(OLDEST) {
        return Err(Unavailable::TooOld { driver: version.to_string(), kernels: OLDEST });
    }
    Ok(())
}
