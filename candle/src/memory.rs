//! The bytes of one candle storage.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, Tensor, Var};
use posthoc_ema::{Dtype, Error, Result, TensorViewMut};
use zerocopy::IntoBytes;

#[cfg(feature = "cuda")]
use crate::cuda;

/// What the owner of a variable does with its elements.
type Writer<'a> = dyn FnMut(TensorViewMut<'_>) -> Result<()> + 'a;

pub fn tensor_error(name: &str, reason: impl fmt::Display) -> Error {
    Error::Tensor { tensor: name.to_owned(), reason: reason.to_string() }
}

/// A dtype of candle as safetensors files name it.
pub fn dtype(name: &str, dtype: DType) -> Result<Dtype> {
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
        // Of 4 and 6 bits, where elements share bytes, and what a later candle may bring.
        _ => return Err(tensor_error(name, format!("{dtype:?} is not supported: pass the other tensors by name"))),
    })
}

/// The storage, where the CPU can read it.
pub fn on_cpu<'a>(name: &str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    let remedy = match storage {
        Storage::Cpu(storage) => return Ok(storage),
        Storage::Cuda(_) => "on a CUDA device: build posthoc-ema-candle with its feature `cuda`, or pass",
        Storage::Metal(_) => "on a Metal device: pass",
    };
    let copy = "a copy, made with `to_device(&Device::Cpu)`, as one of `NamedTensors`";
    Err(tensor_error(name, format!("{remedy} {copy}")))
}

/// The elements of a contiguous tensor, in place but for the one dtype whose bits cannot be seen from outside.
pub fn bytes<'a>(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [u8]>> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| tensor_error(name, "not contiguous"))?;
    let place = start..end;
    let bytes = match storage {
        CpuStorage::U8(values) | CpuStorage::F8E8M0(values) => &values[place],
        CpuStorage::U32(values) => values[place].as_bytes(),
        CpuStorage::I16(values) => values[place].as_bytes(),
        CpuStorage::I32(values) => values[place].as_bytes(),
        CpuStorage::I64(values) => values[place].as_bytes(),
        CpuStorage::BF16(values) => values[place].as_bytes(),
        CpuStorage::F16(values) => values[place].as_bytes(),
        CpuStorage::F32(values) => values[place].as_bytes(),
        CpuStorage::F64(values) => values[place].as_bytes(),
        CpuStorage::F8E4M3(values) => return Ok(values[place].iter().map(|value| value.to_bits()).collect()),
        CpuStorage::F6E2M3(_) | CpuStorage::F6E3M2(_) | CpuStorage::F4(_) => {
            return Err(tensor_error(name, "elements that share bytes are not supported"));
        }
    };
    Ok(Cow::Borrowed(bytes))
}

/// Lends a variable's elements for writing.
pub fn write(name: &str, var: &Var, write: &mut Writer<'_>) -> Result<()> {
    let dtype = dtype(name, var.dtype())?;
    let on_host = match &*var.storage_and_layout().0 {
        #[cfg(feature = "cuda")]
        Storage::Cuda(_) => false,
        // Candle's own refusal does not say what to do.
        storage => on_cpu(name, storage).map(|_| true)?,
    };
    if on_host && dtype == Dtype::F8_E4M3 {
        return write_copy(name, var, write);
    }
    let lent = Lent { name, dtype, write: RefCell::new(write), outcome: RefCell::new(Ok(())) };
    var.inplace_op1(&lent).map_err(|error| tensor_error(name, error))?;
    lent.outcome.into_inner()
}

/// Lends a copy, and puts it in the variable's place.
fn write_copy(name: &str, var: &Var, write: &mut Writer<'_>) -> Result<()> {
    let mut copy = {
        let (storage, layout) = var.storage_and_layout();
        bytes(name, on_cpu(name, &storage)?, layout)?.into_owned()
    };
    write(TensorViewMut::host(name, dtype(name, var.dtype())?, var.dims(), &mut copy)?)?;
    let copy = Tensor::from_raw_buffer(&copy, var.dtype(), var.dims(), var.device());
    copy.and_then(|copy| var.set(&copy)).map_err(|error| tensor_error(name, error))
}

/// An operation in place, candle's one way to a variable's storage; it takes `&self`, hence the cells.
struct Lent<'a, 'w> {
    name: &'a str,
    dtype: Dtype,
    write: RefCell<&'a mut Writer<'w>>,
    outcome: RefCell<Result<()>>,
}

impl InplaceOp1 for Lent<'_, '_> {
    fn name(&self) -> &'static str {
        "posthoc-ema"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("not contiguous");
        };
        let place = start..end;
        let bytes = match storage {
            CpuStorage::U8(values) | CpuStorage::F8E8M0(values) => &mut values[place],
            CpuStorage::U32(values) => values[place].as_mut_bytes(),
            CpuStorage::I16(values) => values[place].as_mut_bytes(),
            CpuStorage::I32(values) => values[place].as_mut_bytes(),
            CpuStorage::I64(values) => values[place].as_mut_bytes(),
            CpuStorage::BF16(values) => values[place].as_mut_bytes(),
            CpuStorage::F16(values) => values[place].as_mut_bytes(),
            CpuStorage::F32(values) => values[place].as_mut_bytes(),
            CpuStorage::F64(values) => values[place].as_mut_bytes(),
            CpuStorage::F8E4M3(_) | CpuStorage::F6E2M3(_) | CpuStorage::F6E3M2(_) | CpuStorage::F4(_) => {
                candle_core::bail!("its elements cannot be written in place")
            }
        };
        let view = TensorViewMut::host(self.name, self.dtype, layout.dims(), bytes);
        *self.outcome.borrow_mut() = view.and_then(|view| (self.write.borrow_mut())(view));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        *self.outcome.borrow_mut() = cuda::lend_mut(self.name, storage, layout, |memory| {
            let view = TensorViewMut::cuda(self.name, self.dtype, layout.dims(), memory)?;
            (self.write.borrow_mut())(view)
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn memory_of_a_gpu_is_refused_with_the_remedies() {
        let text = on_cpu("layer.weight", &Storage::Cuda(candle_core::CudaStorage)).unwrap_err().to_string();
        for part in ["`layer.weight`: on a CUDA device", "feature `cuda`", "to_device(&Device::Cpu)"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn dtypes_that_share_bytes_are_refused() {
        for shared in [DType::F4, DType::F6E2M3, DType::F6E3M2] {
            let text = dtype("w", shared).unwrap_err().to_string();
            assert!(text.contains("`w`") && text.contains(&format!("{shared:?}")), "{text}");
        }
    }

    #[test]
    fn bits_that_cannot_be_seen_are_written_by_way_of_a_copy() {
        let var = Var::from_tensor(&Tensor::from_raw_buffer(&[0x38, 0x40], DType::F8E4M3, &[2], &Device::Cpu).unwrap());
        let var = var.unwrap();
        let mut seen = Vec::new();
        let mut swap = |view: TensorViewMut<'_>| {
            let bytes = view.into_host_bytes().unwrap();
            seen = bytes.to_vec();
            bytes.swap(0, 1);
            Ok(())
        };
        write("w", &var, &mut swap).unwrap();
        assert_eq!(seen, [0x38, 0x40]);
        let (storage, layout) = var.storage_and_layout();
        assert_eq!(*bytes("w", on_cpu("w", &storage).unwrap(), layout).unwrap(), [0x40, 0x38]);
    }
}
