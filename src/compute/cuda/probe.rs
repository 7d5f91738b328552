//! Whether there is a driver, and how many devices: found out without ever calling what might not be there.

use std::ffi::{c_int, c_uint};
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::sys;
use libloading::Library;

/// Why no CUDA device can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// There is no driver on this machine.
    NoDriver,
    /// The library that is there lacks this function.
    Incomplete(&'static str),
    /// The driver is older than the kernels.
    TooOld {
        /// The newest CUDA version that the driver knows.
        driver: String,
        /// The CUDA version that compiled the kernels.
        kernels: &'static str,
    },
    /// The driver refused to start.
    Refused(c_uint),
    /// The driver runs and there is no device.
    NoDevice,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unavailable::NoDriver => f.write_str("there is no NVIDIA driver on this machine (libcuda.so.1)"),
            Unavailable::Incomplete(name) => {
                write!(f, "the NVIDIA driver lacks {name}: it is damaged or far too old; install a current one")
            }
            Unavailable::TooOld { driver, kernels } => {
                write!(f, "the NVIDIA driver knows CUDA {driver}, the kernels need {kernels}: update the driver")
            }
            Unavailable::Refused(34) => f.write_str(
                "the libcuda.so that is found is a stub of the CUDA toolkit: take its folder off LD_LIBRARY_PATH",
            ),
            Unavailable::Refused(802) => f.write_str(
                "the NVIDIA driver is not ready (error 802): on machines with NVSwitch its fabric manager must run first",
            ),
            Unavailable::Refused(803) => f.write_str(
                "parts of the NVIDIA driver are of different versions (error 803): reboot after its update",
            ),
            Unavailable::Refused(code) => {
                write!(f, "the NVIDIA driver does not start (error {code}): see whether nvidia-smi works")
            }
            Unavailable::NoDevice => f.write_str("the NVIDIA driver finds no device (see CUDA_VISIBLE_DEVICES)"),
        }
    }
}

/// The CUDA version of the compiler that made the kernels.
const KERNELS: &str = match option_env!("POSTHOC_EMA_CUDA_VERSION") {
    Some(version) => version,
    None => "0.0",
};

/// What is called, here or by way of cudarc, which panics for a function that is missing.
const NEEDED: [&str; 33] = [
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
    "cuMemGetInfo_v2",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoH_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
];

/// The number of devices, found out once.
///
/// # Errors
/// Why there is none to use.
pub fn devices() -> Result<usize, Unavailable> {
    static FOUND: OnceLock<Result<usize, Unavailable>> = OnceLock::new();
    FOUND.get_or_init(probe).clone()
}

fn probe() -> Result<usize, Unavailable> {
    // In cudarc's order, so that what is looked at is what is used.
    // SAFETY: loading the driver's library runs its initialisers, as every CUDA program does.
    let open = |name: &&str| unsafe { Library::new(*name) }.ok();
    let library = ["libcuda.so", "libcuda.so.1"].iter().find_map(open).ok_or(Unavailable::NoDriver)?;
    for name in NEEDED {
        // SAFETY: the symbol is only looked up, never called through this type.
        if unsafe { library.get::<*const ()>(name.as_bytes()) }.is_err() {
            return Err(Unavailable::Incomplete(name));
        }
    }
    // The driver does not survive being unloaded.
    std::mem::forget(library);
    // By way of cudarc, whose own search for the library might end at another one.
    // SAFETY: the library is there and has the function.
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

/// Machine code of one major version of CUDA runs on drivers of that version and later.
fn check_version() -> Result<(), Unavailable> {
    let mut version: c_int = 0;
    // SAFETY: the driver is initialised, and the pointer is valid for the call.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut version) } as c_uint;
    if code != 0 {
        return Err(Unavailable::Refused(code));
    }
    let needed = KERNELS.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    if version / 1000 < needed {
        let driver = format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(Unavailable::TooOld { driver, kernels: KERNELS });
    }
    Ok(())
}
