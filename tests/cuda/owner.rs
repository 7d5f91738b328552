//! Device memory of another library, such as PyTorch.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result};
use posthoc_ema::{CudaMemory, CudaMemoryMut};

use crate::driver::driver;

/// Library that trains, with its own context object and stream.
pub struct Owner {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

/// Memory of an [`Owner`], at any alignment.
pub struct Owned<'o> {
    owner: &'o Owner,
    allocation: u64,
    shift: usize,
    pub bytes: usize,
}

impl Owner {
    pub fn new() -> Owner {
        Owner::on(0)
    }

    pub fn on(device: usize) -> Owner {
        driver();
        let context = CudaContext::new(device).unwrap();
        let stream = context.new_stream().unwrap();
        Owner { context, stream }
    }

    pub fn stream(&self) -> usize {
        self.stream.cu_stream().addr()
    }

    /// Makes the device current on this thread.
    pub fn make_current(&self) {
        self.context.bind_to_thread().unwrap();
    }

    pub fn wait(&self) {
        self.stream.synchronize().unwrap();
    }

    /// Allocates memory with these bytes, `shift` bytes after the start of an allocation.
    pub fn own(&self, bytes: &[u8], shift: usize) -> Owned<'_> {
        self.context.bind_to_thread().unwrap();
        // SAFETY: the context is current, and the size is not 0.
        let allocation = unsafe { result::malloc_sync(bytes.len() + shift + 1) }.unwrap();
        let owned = Owned { owner: self, allocation, shift, bytes: bytes.len() };
        owned.set(bytes);
        owned
    }
}

impl Owned<'_> {
    /// Queues a copy of new bytes on the owner's stream, as an optimiser does.
    pub fn set(&self, bytes: &[u8]) {
        self.try_set(bytes).unwrap();
    }

    pub fn try_set(&self, bytes: &[u8]) -> Result<(), String> {
        assert_eq!(bytes.len(), self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        self.owner.context.bind_to_thread().map_err(|error| error.to_string())?;
        // SAFETY: it is within the allocation, and pageable memory has been read when the call returns.
        unsafe { result::memcpy_htod_async(self.address(), bytes, self.owner.stream.cu_stream()) }
            .map_err(|error| error.to_string())
    }

    pub fn get(&self) -> Vec<u8> {
        self.owner.context.bind_to_thread().unwrap();
        let mut bytes = vec![0; self.bytes];
        if !bytes.is_empty() {
            // SAFETY: it is within the allocation, and the destination has the same size.
            unsafe { result::memcpy_dtoh_async(&mut bytes, self.address(), self.owner.stream.cu_stream()) }.unwrap();
            self.owner.wait();
        }
        bytes
    }

    pub fn address(&self) -> u64 {
        self.allocation + self.shift as u64
    }

    pub fn lend(&self) -> CudaMemory<'_> {
        let device = self.owner.context.ordinal();
        // SAFETY: the allocation lives as long as `self`, and is freed after the work of the owner's stream.
        unsafe { CudaMemory::from_raw(device, self.owner.stream(), self.address(), self.bytes) }
    }

    pub fn lend_mut(&self) -> CudaMemoryMut<'_> {
        let device = self.owner.context.ordinal();
        // SAFETY: as in `lend`. All of the owner's work is on this stream.
        unsafe { CudaMemoryMut::from_raw(device, self.owner.stream(), self.address(), self.bytes) }
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        let _ = self.owner.context.bind_to_thread();
        let _ = self.owner.stream.synchronize();
        // SAFETY: it was allocated by `own` and is freed once.
        let _ = unsafe { result::free_sync(self.allocation) };
    }
}
