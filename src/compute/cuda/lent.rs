//! Memory on a device that somebody lends.

use std::marker::PhantomData;

use crate::tensor::CudaMemory;

impl CudaMemory<'_> {
    /// Memory on a device, with the stream on which its owner works with it: what PyTorch and other libraries hand over.
    ///
    /// `stream` is the owner's `CUstream` as a number; 0 is the legacy default stream. The memory is read and written in
    /// the order of that stream, so whatever the owner queues there afterwards comes after.
    ///
    /// # Safety
    /// `address` must lie in memory of that device, allocated in its primary context, with `bytes` bytes from there on
    /// that stay allocated for `'a`, or are freed in the order of `stream` later. `stream` must belong to the same context
    /// and exist for `'a`. Where the memory is lent for writing, nobody else may use it meanwhile.
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
