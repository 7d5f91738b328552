//! Memory that this crate allocates on a device, and copies of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::{CudaStream, result};

use super::device::format_bytes;
use super::{CudaDevice, Pinned};
use crate::error::Result;

/// Memory on a device. The owner orders all work on it.
#[derive(Debug)]
pub struct Buffer {
    device: Arc<CudaDevice>,
    address: u64,
    bytes: usize,
    /// True if work may still use the memory whose end no owner waits for.
    has_pending_work: AtomicBool,
}

impl Buffer {
    /// Allocates memory of undefined content, aligned to 256 bytes.
    ///
    /// It does not come from a pool, because these buffers live as long as a run.
    ///
    /// # Errors
    /// [`crate::Error::DeviceMemory`] if the device has too little memory, with the size and the purpose.
    pub fn new(device: &Arc<CudaDevice>, bytes: usize, purpose: &str) -> Result<Buffer> {
        let _bound = device.bind()?;
        let allocation_error = |error| {
            let free = match result::mem_get_info() {
                Ok((free, _)) => format!(", {} are free", format_bytes(free)),
                Err(_) => String::new(),
            };
            device.driver_error(&format!("allocate {} for {purpose}{free}", format_bytes(bytes)))(error)
        };
        // SAFETY: the device's context is current. The size is not 0, which the driver rejects.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(allocation_error)?;
        Ok(Buffer { device: device.clone(), address, bytes, has_pending_work: AtomicBool::new(false) })
    }

    /// Returns the address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Returns true if the size is 0.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Makes the drop wait for all work of the device, for an owner that does not wait itself.
    pub(super) fn wait_on_drop(&self) {
        self.has_pending_work.store(true, Ordering::Relaxed);
    }

    /// Queues the zeroing of all bytes.
    pub(super) fn clear(&self, stream: &CudaStream) -> Result<()> {
        self.fill(stream, 0)
    }

    /// Queues the setting of all bytes to `byte`.
    pub(super) fn fill(&self, stream: &CudaStream, byte: u8) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let _bound = self.device.bind()?;
        // SAFETY: we own the memory, which has that many bytes, and the stream is of the same context.
        unsafe { result::memset_d8_async(self.address, byte, self.bytes, stream.cu_stream()) }
            .map_err(self.device.driver_error("clear memory"))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Ok(_bound) = self.device.bind() else { return };
        if self.has_pending_work.load(Ordering::Relaxed) {
            // An error here was already reported.
            let _ = result::ctx::synchronize();
        }
        // SAFETY: it was allocated by `new` and is freed once. The owner waits for work that uses it: NVIDIA does not
        // promise that this call does. An error here comes from an earlier launch and was reported there.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Queues a copy from pinned memory to a device.
///
/// # Safety
/// * `from..from + bytes` is within `pinned`, and `to..to + bytes` within memory of the stream's device.
/// * Until the copy has run, both stay allocated and the source does not change.
pub(super) unsafe fn copy_to_device(
    device: &CudaDevice,
    stream: &CudaStream,
    to: u64,
    pinned: &Pinned,
    from: usize,
    bytes: usize,
) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller guarantees that it is within the allocation. Only its address is used now.
    let source = unsafe { std::slice::from_raw_parts(pinned.start().add(from), bytes) };
    // SAFETY: guaranteed by the caller.
    unsafe { result::memcpy_htod_async(to, source, stream.cu_stream()) }
        .map_err(device.driver_error("copy to the device"))
}

/// Queues a copy from a device to pinned memory.
///
/// # Safety
/// * `to..to + bytes` is within `pinned`, and `from..from + bytes` within memory of the stream's device.
/// * Until the copy has run, both stay allocated and nothing reads the destination.
pub(super) unsafe fn copy_to_host(
    device: &CudaDevice,
    stream: &CudaStream,
    pinned: &Pinned,
    to: usize,
    from: u64,
    bytes: usize,
) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller guarantees that it is within the allocation and that nothing else reads it.
    let target = unsafe { std::slice::from_raw_parts_mut(pinned.start().add(to), bytes) };
    // SAFETY: guaranteed by the caller.
    unsafe { result::memcpy_dtoh_async(target, from, stream.cu_stream()) }
        .map_err(device.driver_error("copy to the host"))
}

/// Queues a copy within a device.
///
/// # Safety
/// Both ranges are within memory of the stream's device that stays allocated until the copy has run.
pub(super) unsafe fn copy_on_device(
    device: &CudaDevice,
    stream: &CudaStream,
    to: u64,
    from: u64,
    bytes: usize,
) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: guaranteed by the caller.
    unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }
        .map_err(device.driver_error("copy within the device"))
}
