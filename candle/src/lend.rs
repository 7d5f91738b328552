//! Views of many tensors at once, behind the read guards of their storages.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ptr;

use candle_core::{Storage, Tensor};
use posthoc_ema::{Result, TensorView};

use crate::memory::{bytes, dtype, on_cpu, tensor_error};

/// Calls `read` with a view of every tensor, all of the same moment.
pub fn with_tensors(tensors: &[(&str, &Tensor)], read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
    let addresses: Vec<usize> = tensors.iter().map(|(_, tensor)| address(tensor)).collect();
    // One guard for each storage: a second read of a lock for which a writer waits would wait for that writer. In
    // order of address, as candle locks the operands of its operations.
    let distinct: BTreeMap<usize, &Tensor> = addresses.iter().copied().zip(tensors.iter().map(|(_, t)| *t)).collect();
    let guards: BTreeMap<usize, _> =
        distinct.into_iter().map(|(address, tensor)| (address, tensor.storage_and_layout().0)).collect();
    let mut lent = Vec::with_capacity(tensors.len());
    for (&(name, tensor), address) in tensors.iter().zip(&addresses) {
        lent.push((name, dtype(name, tensor.dtype())?, tensor.dims(), elements(name, tensor, &guards[address])?));
    }
    let views: Vec<_> = lent
        .iter()
        .map(|(name, dtype, shape, elements)| TensorView::host(name, *dtype, shape, elements))
        .collect::<Result<_>>()?;
    read(&views)
}

/// Where a tensor's storage lies; its lock is held for this moment only.
fn address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    ptr::from_ref::<Storage>(&storage).addr()
}

/// The elements in C order: in place, or a copy of those that do not lie so.
fn elements<'a>(name: &str, tensor: &Tensor, storage: &'a Storage) -> Result<Cow<'a, [u8]>> {
    let storage = on_cpu(name, storage)?;
    if tensor.is_contiguous() {
        return bytes(name, storage, tensor.layout());
    }
    // Candle locks the storage recursively for this, so that the guard that is held already does not matter.
    let copy = tensor.contiguous().map_err(|error| tensor_error(name, error))?;
    let (storage, layout) = copy.storage_and_layout();
    Ok(Cow::Owned(bytes(name, on_cpu(name, &storage)?, layout)?.into_owned()))
}
