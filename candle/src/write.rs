//! Views to write the elements of one variable.

use std::cell::RefCell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor, Var};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, Storage};
use posthoc_ema::{Dtype, Result, TensorViewMut};
use zerocopy::IntoBytes;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::tensor_error;
use crate::host::{bytes, on_cpu, to_dtype};

/// Function of the caller that writes the elements of a variable.
type Writer<'a> = dyn FnMut(TensorViewMut<'_>) -> Result<()> + 'a;

/// Calls `write` with a view of a variable's elements.
pub fn write_var(name: &str, var: &Var, write: &mut Writer<'_>) -> Result<()> {
    let dtype = to_dtype(name, var.dtype())?;
    let on_host = match &*var.storage_and_layout().0 {
        #[cfg(feature = "cuda")]
        Storage::Cuda(_) => false,
        // Candle's own error does not name a remedy.
        storage => on_cpu(name, storage).map(|_| true)?,
    };
    if on_host && dtype == Dtype::F8_E4M3 {
        return write_copy(name, var, write);
    }
    let operation = WriteInPlace { name, dtype, write: RefCell::new(write), result: RefCell::new(Ok(())) };
    var.inplace_op1(&operation).map_err(|error| tensor_error(name, error))?;
    operation.result.into_inner()
}

/// Calls `write` with a view of a copy, and stores the copy in the variable.
fn write_copy(name: &str, var: &Var, write: &mut Writer<'_>) -> Result<()> {
    let mut copy = {
        let (storage, layout) = var.storage_and_layout();
        bytes(name, on_cpu(name, &storage)?, layout)?.into_owned()
    };
    write(TensorViewMut::host(name, to_dtype(name, var.dtype())?, var.dims(), &mut copy)?)?;
    let copy = Tensor::from_raw_buffer(&copy, var.dtype(), var.dims(), var.device());
    copy.and_then(|copy| var.set(&copy)).map_err(|error| tensor_error(name, error))
}

/// Operation in place, the only access that candle gives to a variable's storage. It is called with `&self`, hence the
/// cells.
struct WriteInPlace<'a, 'w> {
    name: &'a str,
    dtype: Dtype,
    write: RefCell<&'a mut Writer<'w>>,
    result: RefCell<Result<()>>,
}

impl InplaceOp1 for WriteInPlace<'_, '_> {
    fn name(&self) -> &'static str {
        "posthoc-ema"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("not contiguous");
        };
        let range = start..end;
        let bytes = match storage {
            CpuStorage::U8(values) | CpuStorage::F8E8M0(values) => &mut values[range],
            CpuStorage::U32(values) => values[range].as_mut_bytes(),
            CpuStorage::I16(values) => values[range].as_mut_bytes(),
            CpuStorage::I32(values) => values[range].as_mut_bytes(),
            CpuStorage::I64(values) => values[range].as_mut_bytes(),
            CpuStorage::BF16(values) => values[range].as_mut_bytes(),
            CpuStorage::F16(values) => values[range].as_mut_bytes(),
            CpuStorage::F32(values) => values[range].as_mut_bytes(),
            CpuStorage::F64(values) => values[range].as_mut_bytes(),
            CpuStorage::F8E4M3(_) | CpuStorage::F6E2M3(_) | CpuStorage::F6E3M2(_) | CpuStorage::F4(_) => {
                candle_core::bail!("its elements cannot be written in place")
            }
        };
        let view = TensorViewMut::host(self.name, self.dtype, layout.dims(), bytes);
        *self.result.borrow_mut() = view.and_then(|view| (self.write.borrow_mut())(view));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        *self.result.borrow_mut() = cuda::with_memory_mut(self.name, storage, layout, |memory| {
            let view = TensorViewMut::cuda(self.name, self.dtype, layout.dims(), memory)?;
            (self.write.borrow_mut())(view)
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn f8_bits_are_written_through_a_copy() {
        let var = Var::from_tensor(&Tensor::from_raw_buffer(&[0x38, 0x40], DType::F8E4M3, &[2], &Device::Cpu).unwrap());
        let var = var.unwrap();
        let mut seen = Vec::new();
        let mut swap = |view: TensorViewMut<'_>| {
            let bytes = view.into_host_bytes().unwrap();
            seen = bytes.to_vec();
            bytes.swap(0, 1);
            Ok(())
        };
        write_var("w", &var, &mut swap).unwrap();
        assert_eq!(seen, [0x38, 0x40]);
        let (storage, layout) = var.storage_and_layout();
        assert_eq!(*bytes("w", on_cpu("w", &storage).unwrap(), layout).unwrap(), [0x40, 0x38]);
    }
}
