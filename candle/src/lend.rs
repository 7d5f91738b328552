//! Views of many tensors at once, behind the read guards of their storages.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ptr;

use candle_core::{Layout, Storage, Tensor};
use posthoc_ema::{Dtype, Result, TensorView};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::memory::{bytes, dtype, on_cpu, tensor_error};

/// Calls `read` with a view of every tensor, all of the same moment.
pub fn with_tensors(tensors: &[(&str, &Tensor)], read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
    let addresses: Vec<usize> = tensors.iter().map(|(_, tensor)| address(tensor)).collect();
    // One guard for each storage: a second read of a lock for which a writer waits would wait for that writer. In
    // order of address, as candle locks the operands of its operations.
    let distinct: BTreeMap<usize, &Tensor> = addresses.iter().copied().zip(tensors.iter().map(|(_, t)| *t)).collect();
    let guards: BTreeMap<usize, _> =
        distinct.into_iter().map(|(address, tensor)| (address, tensor.storage_and_layout().0)).collect();
    // What does not lie contiguously is copied. Candle locks the storage recursively for this, so that the guard that is
    // held already does not matter.
    let copies = tensors.iter().map(|(name, tensor)| copy(name, tensor)).collect::<Result<Vec<_>>>()?;
    let copied: Vec<_> = copies.iter().map(|copy| copy.as_ref().map(Tensor::storage_and_layout)).collect();
    let mut lent = Vec::with_capacity(tensors.len());
    for ((&(name, tensor), address), copied) in tensors.iter().zip(&addresses).zip(&copied) {
        let (storage, layout) = match copied {
            Some((storage, layout)) => (storage, *layout),
            None => (&guards[address], tensor.layout()),
        };
        lent.push((name, dtype(name, tensor.dtype())?, tensor.dims(), Elements::of(name, storage, layout)?));
    }
    let views: Vec<_> =
        lent.iter().map(|(name, dtype, shape, elements)| elements.view(name, *dtype, shape)).collect::<Result<_>>()?;
    read(&views)
    // Dropped in this order: the guards of memory on a device, now that all work on it is queued; the copies, which
    // candle frees in the order of the same stream; the storages' guards.
}

/// Where a tensor's storage lies; its lock is held for this moment only.
fn address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    ptr::from_ref::<Storage>(&storage).addr()
}

/// A contiguous copy of a tensor that is not contiguous itself.
fn copy(name: &str, tensor: &Tensor) -> Result<Option<Tensor>> {
    if tensor.is_contiguous() {
        return Ok(None);
    }
    tensor.contiguous().map(Some).map_err(|error| tensor_error(name, error))
}

/// The elements of a contiguous tensor, where they lie.
enum Elements<'a> {
    Host(Cow<'a, [u8]>),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Lent<'a>),
}

impl<'a> Elements<'a> {
    fn of(name: &str, storage: &'a Storage, layout: &Layout) -> Result<Elements<'a>> {
        match storage {
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => cuda::lend(name, storage, layout).map(Elements::Cuda),
            storage => bytes(name, on_cpu(name, storage)?, layout).map(Elements::Host),
        }
    }

    fn view<'v>(&'v self, name: &'v str, dtype: Dtype, shape: &'v [usize]) -> Result<TensorView<'v>> {
        match self {
            Elements::Host(bytes) => TensorView::host(name, dtype, shape, bytes),
            #[cfg(feature = "cuda")]
            Elements::Cuda(lent) => TensorView::cuda(name, dtype, shape, lent.memory()),
        }
    }
}
