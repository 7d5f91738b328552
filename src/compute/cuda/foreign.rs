//! Device memory that another library owns and lends to this crate.

use std::marker::PhantomData;

use crate::tensor::{CudaMemory, CudaMemoryMut};

/// Stream of another library on which it captures or launches a CUDA graph with an update of averages.
#[derive(Clone, Copy, Debug)]
pub struct GraphStream<'a> {
    pub(super) device: usize,
    pub(super) stream: usize,
    lent: PhantomData<&'a ()>,
}

impl GraphStream<'_> {
    /// Wraps a stream for one capture or one launch. `stream` is its `CUstream` as a number.
    ///
    /// # Safety
    /// * The stream belongs to the device's primary context, and exists for `'a`.
    /// * A graph that is captured on it reads the parameters in each of its launches: as long as it is launched, they
    ///   stay where they are, and are used in the order of the stream of the launch.
    pub unsafe fn from_raw(device: usize, stream: usize) -> Self {
        GraphStream { device, stream, lent: PhantomData }
    }
}

impl CudaMemory<'_> {
    /// Wraps device memory of another library, such as PyTorch, with the stream on which its owner uses it.
    ///
    /// Elements must be aligned to their size, which is checked when the memory is used.
    ///
    /// `stream` is the owner's `CUstream` as a number, and 0 is the legacy default stream. The memory is read and
    /// written in the order of that stream, so work that the owner queues there later runs later.
    ///
    /// # Safety
    /// * `address` points to `bytes` initialised bytes of that device, allocated in its primary context.
    /// * They stay allocated for `'a`. Afterwards, they are freed, reused or written only in the order of `stream`.
    /// * `stream` belongs to the same context and exists for `'a`. Number 2, the per-thread default stream, is that of
    ///   the thread that calls this crate with the memory.
    pub unsafe fn from_raw(device: usize, stream: usize, address: u64, bytes: usize) -> Self {
        CudaMemory { device, stream, address, bytes, until_fence: false, lent: PhantomData }
    }

    /// Lends the memory until the tracker's fence has passed. The owner's stream does not wait for the copy to the
    /// host, so training continues during it.
    ///
    /// # Safety
    /// The memory may be changed or freed only after the stream that does so, or the host, has waited for the fence
    /// (`PostHocEma::fence`).
    pub unsafe fn until_fence(mut self) -> Self {
        self.until_fence = true;
        self
    }
}

impl CudaMemoryMut<'_> {
    /// Wraps device memory for writing, as [`CudaMemory::from_raw`] does for reading.
    ///
    /// # Safety
    /// As [`CudaMemory::from_raw`]. In addition, all other use of the memory is in the order of `stream`.
    pub unsafe fn from_raw(device: usize, stream: usize, address: u64, bytes: usize) -> Self {
        // SAFETY: guaranteed by the caller.
        CudaMemoryMut(unsafe { CudaMemory::from_raw(device, stream, address, bytes) })
    }
}
