//! Memory on a device that somebody lends.

use std::marker::PhantomData;

use crate::tensor::{CudaMemory, CudaMemoryMut};

impl CudaMemory<'_> {
    /// Memory on a device, with the stream on which its owner works with it: what PyTorch and other libraries hand over.
    ///
    /// Elements lie at multiples of their size; others are refused when the memory is used.
    ///
    /// `stream` is the owner's `CUstream` as a number; 0 is the legacy default stream. The memory is read and written in
    /// the order of that stream, so whatever the owner queues there afterwards comes after.
    ///
    /// # Safety
    /// `address` must lie in memory of that device, allocated in its primary context, with `bytes` initialised bytes from
    /// there on that stay allocated for `'a`, and that are freed, reused or written after that only in the order of
    /// `stream`. `stream` must belong to the same context and exist for `'a`. Number 2, the default stream of each thread,
    /// stands for that of the thread that makes the call the memory is lent for.
    pub unsafe fn from_raw(device: usize, stream: usize, address: u64, bytes: usize) -> Self {
        CudaMemory { device, stream, address, bytes, until_fence: false, lent: PhantomData }
    }

    /// Lends the memory until the fence of the tracker has passed, so that the owner's stream need not wait for a copy of
    /// it to the host: training goes on meanwhile.
    ///
    /// # Safety
    /// Nobody may change or free the memory before the stream that does so has waited for the fence
    /// (`PostHocEma::fence`), or the host has.
    pub unsafe fn until_fence(mut self) -> Self {
        self.until_fence = true;
        self
    }
}

impl CudaMemoryMut<'_> {
    /// As [`CudaMemory::from_raw`], for writing.
    ///
    /// # Safety
    /// As there; and whoever else uses the memory does so in the order of `stream`.
    pub unsafe fn from_raw(device: usize, stream: usize, address: u64, bytes: usize) -> Self {
        // SAFETY: the caller's promise.
        CudaMemoryMut(unsafe { CudaMemory::from_raw(device, stream, address, bytes) })
    }
}
