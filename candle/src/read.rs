//! Views to read many tensors at once, behind the read guards of their storages.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ptr;

use candle_core::{Layout, Storage, Tensor};
use posthoc_ema::{Dtype, Result, TensorView};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::tensor_error;
use crate::host::{bytes, on_cpu, to_dtype};

/// Calls `read` with a view of every tensor. All storages are locked together, so the views are of one moment.
pub fn with_tensors(tensors: &[(&str, &Tensor)], read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
    let addresses: Vec<usize> = tensors.iter().map(|(_, tensor)| storage_address(tensor)).collect();
    // One guard for each storage: if a writer waits for a lock, a second read of it would wait for that writer. They
    // are taken in the order of the addresses, as candle locks the operands of its operations.
    let distinct: BTreeMap<usize, &Tensor> = addresses.iter().copied().zip(tensors.iter().map(|(_, t)| *t)).collect();
    let guards: BTreeMap<usize, _> =
        distinct.into_iter().map(|(address, tensor)| (address, tensor.storage_and_layout().0)).collect();
    // Tensors that are not contiguous are copied. Candle takes a recursive read lock for it, so the guard that is
    // already held does no harm.
    let copies = tensors.iter().map(|(name, tensor)| contiguous_copy(name, tensor)).collect::<Result<Vec<_>>>()?;
    let copied: Vec<_> = copies.iter().map(|copy| copy.as_ref().map(Tensor::storage_and_layout)).collect();
    let mut borrowed = Vec::with_capacity(tensors.len());
    for ((&(name, tensor), address), copied) in tensors.iter().zip(&addresses).zip(&copied) {
        let (storage, layout) = match copied {
            Some((storage, layout)) => (storage, *layout),
            None => (&guards[address], tensor.layout()),
        };
        borrowed.push((name, to_dtype(name, tensor.dtype())?, tensor.dims(), Elements::new(name, storage, layout)?));
    }
    let views: Vec<_> = borrowed
        .iter()
        .map(|(name, dtype, shape, elements)| elements.view(name, *dtype, shape))
        .collect::<Result<_>>()?;
    read(&views)
    // All work on a device is queued now. Dropped in this order: the guards of device memory; the copies, which candle
    // frees in the order of the same stream; the guards of the storages.
}

/// Returns the address of a tensor's storage, whose lock is held during this call only.
fn storage_address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    ptr::from_ref::<Storage>(&storage).addr()
}

/// Copies a tensor that is not contiguous; returns `None` for one that is.
fn contiguous_copy(name: &str, tensor: &Tensor) -> Result<Option<Tensor>> {
    if tensor.is_contiguous() {
        return Ok(None);
    }
    tensor.contiguous().map(Some).map_err(|error| tensor_error(name, error))
}

/// Elements of a contiguous tensor, borrowed from its storage.
enum Elements<'a> {
    Host(Cow<'a, [u8]>),
    #[cfg(feature = "cuda")]
    Cuda(cuda::CudaElements<'a>),
}

impl<'a> Elements<'a> {
    fn new(name: &str, storage: &'a Storage, layout: &Layout) -> Result<Elements<'a>> {
        match storage {
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => cuda::CudaElements::new(name, storage, layout).map(Elements::Cuda),
            storage => bytes(name, on_cpu(name, storage)?, layout).map(Elements::Host),
        }
    }

    fn view<'v>(&'v self, name: &'v str, dtype: Dtype, shape: &'v [usize]) -> Result<TensorView<'v>> {
        match self {
            Elements::Host(bytes) => TensorView::host(name, dtype, shape, bytes),
            #[cfg(feature = "cuda")]
            Elements::Cuda(elements) => TensorView::cuda(name, dtype, shape, elements.memory()),
        }
    }
}
