//! Small groups of options that several commands share.

use clap::{Args, ValueEnum};
use posthoc_ema::{At, Device, Dtype, Noise, cuda_devices};

/// Time of the targets.
#[derive(Args)]
pub struct AtArgs {
    /// Time of the targets [default: the newest snapshot]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
}

impl AtArgs {
    pub fn at(&self) -> At {
        self.at.map_or(At::Latest, At::Step)
    }
}

/// Dtype of averages, and the device that blends them.
#[derive(Args)]
pub struct BlendArgs {
    /// Dtype of averaged tensors [default: the model's, or that of --like]
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,
    /// Device to blend on: auto (whichever is faster for the job), cpu, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
}

impl BlendArgs {
    pub fn dtype(&self) -> Option<Dtype> {
        self.dtype.map(Dtype::from)
    }

    /// Returns `: reason` if `auto` found no CUDA device in a program built with CUDA, and an empty text otherwise.
    pub fn why_not_cuda(&self) -> String {
        if !cfg!(feature = "cuda") || self.device != Device::Auto {
            return String::new();
        }
        cuda_devices().err().map_or(String::new(), |why| format!(": {why}"))
    }
}

/// Treatment of the rounding of stored snapshots.
#[derive(Args)]
pub struct NoiseArgs {
    /// Weigh the snapshots' rounding, too: off, auto (whatever regularisation has the smallest predicted error), or RHO
    #[arg(long, value_name = "off|auto|RHO", default_value = "off", allow_negative_numbers = true)]
    pub noise: Noise,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum DtypeName {
    F32,
    F16,
    Bf16,
    F64,
}

impl From<DtypeName> for Dtype {
    fn from(name: DtypeName) -> Dtype {
        match name {
            DtypeName::F32 => Dtype::F32,
            DtypeName::F16 => Dtype::F16,
            DtypeName::Bf16 => Dtype::BF16,
            DtypeName::F64 => Dtype::F64,
        }
    }
}
