//! The memory of candle's tensors on CUDA devices: the one place with `unsafe`.
//!
//! posthoc-ema works on a device through a context object of its own, of the device's primary context, which is candle's
//! too. So its work can be queued on candle's streams, after what candle has queued there and before what comes next.
//! Candle's own order, by events, is kept as for its kernels: a slice's pointer makes the stream wait for writes on other
//! streams, and the guard that comes with it, dropped when the work is queued, tells other streams what to wait for.
//! cudarc does neither where a device was made by `Device::new_cuda`: its only stream is that of the calling thread, so
//! threads that share a model must take turns by `Device::synchronize`, for candle's operations as for ours.

use std::ops::Range;

use candle_core::Layout;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DeviceSlice, SyncOnDrop};
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use posthoc_ema::{CudaMemory, CudaMemoryMut, Result};

use crate::memory::tensor_error;

/// The elements of a contiguous tensor, borrowed from their storage; to be dropped when the work on them is queued.
pub struct Lent<'a> {
    /// The stream of the slice that `address` is part of, in the primary context of its device.
    stream: &'a CudaStream,
    address: u64,
    bytes: usize,
    _queued: SyncOnDrop<'a>,
}

/// Calls a function with the slice of a storage, whatever its element type.
macro_rules! with_slice {
    ($name:ident, $storage:expr, $slice:ident => $result:expr) => {
        match $storage {
            CudaStorageSlice::U8($slice) | CudaStorageSlice::F8E8M0($slice) => $result,
            CudaStorageSlice::U32($slice) => $result,
            CudaStorageSlice::I16($slice) => $result,
            CudaStorageSlice::I32($slice) => $result,
            CudaStorageSlice::I64($slice) => $result,
            CudaStorageSlice::BF16($slice) => $result,
            CudaStorageSlice::F16($slice) => $result,
            CudaStorageSlice::F32($slice) => $result,
            CudaStorageSlice::F64($slice) => $result,
            CudaStorageSlice::F8E4M3($slice) => $result,
            CudaStorageSlice::F6E2M3(_) | CudaStorageSlice::F6E3M2(_) | CudaStorageSlice::F4(_) => {
                Err(tensor_error($name, "elements that share bytes are not supported"))
            }
        }
    };
}

/// Lends elements for reading.
pub fn lend<'a>(name: &str, storage: &'a CudaStorage, layout: &Layout) -> Result<Lent<'a>> {
    let place = place(name, layout)?;
    with_slice!(name, &storage.slice, slice => {
        check_context(name, slice)?;
        let view = slice.try_slice(place).ok_or_else(|| tensor_error(name, "beyond its storage"))?;
        let (stream, bytes) = (slice.stream(), view.num_bytes());
        let (address, _queued) = view.view_ptr(stream);
        Ok(Lent { stream, address, bytes, _queued })
    })
}

/// Calls `write` with elements to be written.
pub fn lend_mut(
    name: &str,
    storage: &mut CudaStorage,
    layout: &Layout,
    write: impl FnOnce(CudaMemoryMut<'_>) -> Result<()>,
) -> Result<()> {
    let place = place(name, layout)?;
    with_slice!(name, &mut storage.slice, slice => {
        check_context(name, slice)?;
        let stream = slice.stream().clone();
        let view = slice.try_slice_mut(place).ok_or_else(|| tensor_error(name, "beyond its storage"))?;
        let bytes = view.num_bytes();
        let (address, _queued) = view.view_ptr_mut(&stream);
        write(Lent { stream: &stream, address, bytes, _queued }.memory_mut())
    })
}

fn place(name: &str, layout: &Layout) -> Result<Range<usize>> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| tensor_error(name, "not contiguous"))?;
    Ok(start..end)
}

/// Candle's devices use primary contexts; an operation of somebody's own might bring memory of another.
fn check_context<T>(name: &str, slice: &CudaSlice<T>) -> Result<()> {
    if slice.context().is_primary() {
        return Ok(());
    }
    Err(tensor_error(name, "allocated in another context than its device's primary one: pass a copy"))
}

impl Lent<'_> {
    /// The elements, for as long as they are borrowed.
    pub fn memory(&self) -> CudaMemory<'_> {
        let (device, stream) = (self.stream.context().ordinal(), self.stream.cu_stream().addr());
        // SAFETY: `address` and `bytes` are a checked part of a slice, which was allocated in the context of its stream,
        // the device's primary one. Slice and stream are borrowed from the storage, whose lock is held meanwhile, for
        // writing where it is lent so. Afterwards cudarc frees a slice by `cuMemFreeAsync` on this very stream, or waits
        // for the stream and frees it then where the device has no memory pools.
        unsafe { CudaMemory::from_raw(device, stream, self.address, self.bytes) }
    }

    /// As [`Lent::memory`], for writing.
    fn memory_mut(&mut self) -> CudaMemoryMut<'_> {
        let (device, stream) = (self.stream.context().ordinal(), self.stream.cu_stream().addr());
        // SAFETY: as above; the only caller has the storage borrowed for writing.
        unsafe { CudaMemoryMut::from_raw(device, stream, self.address, self.bytes) }
    }
}
