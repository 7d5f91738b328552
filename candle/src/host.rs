//! Dtype and bytes of tensors in host memory.

use std::borrow::Cow;

use candle_core::{CpuStorage, DType, Layout, Storage};
use posthoc_ema::{Dtype, Result};
use zerocopy::IntoBytes;

use crate::error::tensor_error;

/// Converts a dtype of candle to that of safetensors files.
///
/// # Errors
/// For dtypes of 4 and 6 bits, whose elements share bytes, and those that this version does not know.
pub fn to_dtype(name: &str, dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::U8 => Dtype::U8,
        DType::U32 => Dtype::U32,
        DType::I16 => Dtype::I16,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::F8E4M3 => Dtype::F8_E4M3,
        DType::F8E8M0 => Dtype::F8_E8M0,
        _ => return Err(tensor_error(name, format!("{dtype:?} is not supported: pass the other tensors by name"))),
    })
}

/// Returns a storage in host memory.
///
/// # Errors
/// If the storage is on a device; the message names the remedy.
pub fn on_cpu<'a>(name: &str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    let remedy = match storage {
        Storage::Cpu(storage) => return Ok(storage),
        Storage::Cuda(_) => "on a CUDA device: build posthoc-ema-candle with its feature `cuda`, or pass",
        Storage::Metal(_) => "on a Metal device: pass",
    };
    let copy = "a copy, made with `to_device(&Device::Cpu)`, as one of `NamedTensors`";
    Err(tensor_error(name, format!("{remedy} {copy}")))
}

/// Returns the bytes of a contiguous tensor, borrowed from its storage.
///
/// F8E4M3 is copied: candle hides the bits of its elements.
pub fn bytes<'a>(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [u8]>> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| tensor_error(name, "not contiguous"))?;
    let range = start..end;
    let bytes = match storage {
        CpuStorage::U8(values) | CpuStorage::F8E8M0(values) => &values[range],
        CpuStorage::U32(values) => values[range].as_bytes(),
        CpuStorage::I16(values) => values[range].as_bytes(),
        CpuStorage::I32(values) => values[range].as_bytes(),
        CpuStorage::I64(values) => values[range].as_bytes(),
        CpuStorage::BF16(values) => values[range].as_bytes(),
        CpuStorage::F16(values) => values[range].as_bytes(),
        CpuStorage::F32(values) => values[range].as_bytes(),
        CpuStorage::F64(values) => values[range].as_bytes(),
        CpuStorage::F8E4M3(values) => return Ok(values[range].iter().map(|value| value.to_bits()).collect()),
        CpuStorage::F6E2M3(_) | CpuStorage::F6E3M2(_) | CpuStorage::F4(_) => {
            return Err(tensor_error(name, "elements that share bytes are not supported"));
        }
    };
    Ok(Cow::Borrowed(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn gpu_storage_is_refused_with_the_remedy() {
        let text = on_cpu("layer.weight", &Storage::Cuda(candle_core::CudaStorage)).unwrap_err().to_string();
        for part in ["`layer.weight`: on a CUDA device", "feature `cuda`", "to_device(&Device::Cpu)"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn dtypes_that_share_bytes_are_refused() {
        for shared in [DType::F4, DType::F6E2M3, DType::F6E3M2] {
            let text = to_dtype("w", shared).unwrap_err().to_string();
            assert!(text.contains("`w`") && text.contains(&format!("{shared:?}")), "{text}");
        }
    }
}
