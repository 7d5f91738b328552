//! Words and remedies for error codes of the driver.

/// Returns the remedy for an error code of the driver, to follow a colon; none if there is none.
pub(super) fn remedy(code: u32) -> Option<&'static str> {
    Some(match code {
        2 => {
            "free memory of the device (torch.cuda.empty_cache() returns what PyTorch has cached), or keep the \
             averages on the host and blend on the CPU"
        }
        34 => "the loaded libcuda.so is a stub of the CUDA toolkit: remove its folder from LD_LIBRARY_PATH",
        3 | 35 => "the NVIDIA driver is too old or its kernel module does not match: update it and reboot",
        46 => "another process has the device for itself: end it, or choose another device by CUDA_VISIBLE_DEVICES",
        100 => "check CUDA_VISIBLE_DEVICES, and that nvidia-smi lists a device; a container needs `--gpus all`",
        101 => "the machine has no device of this number: check CUDA_VISIBLE_DEVICES, and what nvidia-smi lists",
        200 | 209 | 218 => "build for this device with POSTHOC_EMA_CUDA_ARCHS, or use the CPU",
        201 | 400 => "the stream that came with the memory belongs to another device or no longer exists",
        221 => "install the whole driver: libnvidia-ptxjitcompiler.so.1 is missing, which compiles PTX",
        222 => "the driver is older than the kernels' compiler: update it, or build with an nvcc of its CUDA version",
        223 => "CUDA_DISABLE_PTX_JIT forbids the compilation of PTX: unset it, or update the driver",
        214 | 700 | 702 | 714 | 715 | 716 | 718 | 719 => {
            "a kernel of this process failed: restart the process to use the device again; files on disk are intact"
        }
        802 => "the NVIDIA driver is not ready: with NVSwitch, start its fabric manager first",
        803 => "parts of the NVIDIA driver have different versions: reboot after the driver's update",
        804 => {
            "the loaded libcuda.so is a forward compatibility library, which works on data-centre devices only: remove \
             the folder of cuda-compat from LD_LIBRARY_PATH"
        }
        900..=907 => "do not call this while a CUDA graph is captured",
        _ => return None,
    })
}

/// Returns the oldest driver for a CUDA version such as 12.0, as NVIDIA's release notes list it for Linux.
pub(super) fn oldest_driver(cuda: &str) -> &'static str {
    match cuda.split('.').next() {
        Some("12") => "525",
        Some("13") => "580",
        _ => "a newer version",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_errors_have_remedies() {
        for code in [2, 34, 35, 100, 101, 209, 222, 700, 803, 804] {
            assert!(remedy(code).is_some_and(|text| text.len() > 20), "{code}");
        }
        assert_eq!(remedy(999), None);
        assert_eq!((oldest_driver("12.0"), oldest_driver("13.0")), ("525", "580"));
    }
}
