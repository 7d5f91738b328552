//! Outputs of a synthesis and the options of writing them.

use std::path::Path;

use safetensors::Dtype;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::planning::Plan;
use crate::tensor::is_averaged;

/// Most targets of one pass. More would exceed the promised memory and a process's limit of open files.
pub(crate) const MAX_TARGETS: usize = 256;

/// Callback for the bytes of sources that were read since its last call. It is called from any thread.
pub(super) type Progress<'a> = Option<&'a (dyn Fn(u64) + Sync)>;

/// Plan and the file that its result is written to.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// Solved target.
    pub plan: &'a Plan,
    /// Path of the file. An existing file is replaced when the new one is complete; of a link, the link and not its
    /// target. A directory, a pipe, a socket or a device is refused before any work.
    ///
    /// `/dev/stdout`, `/dev/stderr`, `/dev/fd/N` and `/dev/null` are written to. The average is collected in an unnamed
    /// file among the system's temporary files (`TMPDIR`) first, which needs as much space. A terminal is refused.
    pub path: &'a Path,
}

/// Options of writing results.
#[derive(Clone, Copy, Default)]
pub struct WriteOptions<'a> {
    /// Dtype of averaged tensors; `None` for the model's own.
    pub dtype: Option<Dtype>,
    /// Device that blends, by default the CPU. The bits are the same on every device.
    ///
    /// [`Device::Auto`] times the CPU and the first CUDA device on the beginning of the job. A short job runs on the
    /// CPU at once.
    pub device: Device,
    /// Called from any thread with the bytes of snapshots that were read since the last call.
    pub progress: Option<&'a (dyn Fn(u64) + Sync)>,
}

impl WriteOptions<'_> {
    /// Checks that averages can be stored in the dtype.
    ///
    /// # Errors
    /// [`Error::Setting`] if it is not a floating-point dtype that can be averaged.
    pub(crate) fn check(&self) -> Result<()> {
        match self.dtype.filter(|&dtype| !is_averaged(dtype)) {
            Some(dtype) => {
                let reason = format!("{dtype} is not a dtype for averages: choose f32, bf16, f16 or f64");
                Err(Error::Setting { option: "dtype", reason })
            }
            None => Ok(()),
        }
    }
}
