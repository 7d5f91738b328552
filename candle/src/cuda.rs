//! Memory of candle's tensors on CUDA devices. Only this module is `unsafe` and names cudarc, whose types candle has.
//!
//! posthoc-ema has its own context object for a device, but it is of the device's primary context, as candle's is. So
//! its work can be queued on candle's streams: after the work that candle has queued there, and before later work.
//! Candle's own order by events is kept as for its kernels. Taking a slice's pointer makes the stream wait for writes
//! on other streams. The guard that comes with the pointer is dropped when the work is queued, and makes other streams
//! wait for it.
//!
//! cudarc does neither for devices made by `Device::new_cuda`, whose only stream is that of the calling thread. Threads
//! that share a model on them must take turns with `Device::synchronize`, for candle's operations as for ours.

use std::ops::Range;

use candle_core::Layout;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DeviceSlice, SyncOnDrop};
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use posthoc_ema::{CudaMemory, CudaMemoryMut, Result};

use crate::error::tensor_error;

/// Elements of a contiguous tensor, borrowed from their storage. To be dropped when the work on them is queued.
pub struct CudaElements<'a> {
    /// Stream of the slice that `address` is part of, in the primary context of its device.
    stream: &'a CudaStream,
    address: u64,
    bytes: usize,
    _queued: SyncOnDrop<'a>,
}

/// Evaluates an expression with the slice of a storage, of any element type.
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

impl<'a> CudaElements<'a> {
    /// Borrows the elements of a contiguous tensor to read them.
    pub fn new(name: &str, storage: &'a CudaStorage, layout: &Layout) -> Result<CudaElements<'a>> {
        let range = element_range(name, layout)?;
        with_slice!(name, &storage.slice, slice => {
            check_context(name, slice)?;
            let view = slice.try_slice(range).ok_or_else(|| tensor_error(name, "beyond its storage"))?;
            let stream = slice.stream();
            let bytes = view.num_bytes();
            let (address, _queued) = view.view_ptr(stream);
            Ok(CudaElements { stream, address, bytes, _queued })
        })
    }

    /// Returns the memory of the elements, for as long as they are borrowed.
    pub fn memory(&self) -> CudaMemory<'_> {
        let device = self.stream.context().ordinal();
        let stream = self.stream.cu_stream().addr();
        // SAFETY: `address` and `bytes` are a checked part of a slice, which was allocated in the context of its
        // stream, the device's primary one. Slice and stream are borrowed from the storage, whose lock is held
        // meanwhile, for writing if the elements are written. Afterwards cudarc frees a slice by `cuMemFreeAsync` on
        // this very stream; on devices without memory pools it waits for the stream first.
        unsafe { CudaMemory::from_raw(device, stream, self.address, self.bytes) }
    }

    /// Same as [`CudaElements::memory`], for writing.
    fn memory_mut(&mut self) -> CudaMemoryMut<'_> {
        let device = self.stream.context().ordinal();
        let stream = self.stream.cu_stream().addr();
        // SAFETY: as in `memory`; the only caller has borrowed the storage mutably.
        unsafe { CudaMemoryMut::from_raw(device, stream, self.address, self.bytes) }
    }
}

/// Calls `write` with the memory of a contiguous tensor's elements.
pub fn with_memory_mut(
    name: &str,
    storage: &mut CudaStorage,
    layout: &Layout,
    write: impl FnOnce(CudaMemoryMut<'_>) -> Result<()>,
) -> Result<()> {
    let range = element_range(name, layout)?;
    with_slice!(name, &mut storage.slice, slice => {
        check_context(name, slice)?;
        let stream = slice.stream().clone();
        let view = slice.try_slice_mut(range).ok_or_else(|| tensor_error(name, "beyond its storage"))?;
        let bytes = view.num_bytes();
        let (address, _queued) = view.view_ptr_mut(&stream);
        write(CudaElements { stream: &stream, address, bytes, _queued }.memory_mut())
    })
}

/// Returns the range of a contiguous tensor's elements in its storage.
fn element_range(name: &str, layout: &Layout) -> Result<Range<usize>> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| tensor_error(name, "not contiguous"))?;
    Ok(start..end)
}

/// Checks that memory is of its device's primary context. Candle's is, but a custom operation may bring another's.
fn check_context<T>(name: &str, slice: &CudaSlice<T>) -> Result<()> {
    if slice.context().is_primary() {
        return Ok(());
    }
    Err(tensor_error(name, "allocated in another context than its device's primary one: pass a copy"))
}
