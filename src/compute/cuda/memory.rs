//! Memory of our own: on a device, and pinned on the host for copies that run by themselves.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError, result, sys};

use super::Device;
use crate::error::{Error, Result};

/// Memory on a device. Its owner orders all work on it.
#[derive(Debug)]
pub struct Buffer {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Allocates memory of undefined content, at 256 bytes.
    ///
    /// Not from a pool: these live as long as a run, and are nobody's to reuse.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where the device has too little, saying how much was asked for and what for.
    pub fn new(device: &Arc<Device>, bytes: usize, purpose: &str) -> Result<Buffer> {
        let _bound = device.bind()?;
        let driver_error = |error| {
            let free =
                result::mem_get_info().map_or(String::new(), |(free, _)| format!(", {} are free", megabytes(free)));
            device.driver_error(&format!("allocate {} for {purpose}{free}", megabytes(bytes)))(error)
        };
        // SAFETY: the device's context is current. A size of 0 is an error to the driver.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(driver_error)?;
        Ok(Buffer { device: device.clone(), address, bytes })
    }

    /// The address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Queues the filling of all bytes with zeros.
    pub(super) fn clear(&self, stream: &CudaStream) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let _bound = self.device.bind()?;
        // SAFETY: the memory is ours and that long; the stream is of the same context.
        unsafe { result::memset_d8_async(self.address, 0, self.bytes, stream.cu_stream()) }
            .map_err(self.device.driver_error("clear memory"))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Ok(_bound) = self.device.bind() else { return };
        // SAFETY: allocated by `new` and freed once. The driver waits for work that uses it. An error here is that of an
        // earlier, failed launch, which was reported where it was met.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Page-locked memory of the host: copies to and from it run beside the host and the device's other work.
///
/// Ordinary cached memory, not write-combined: the CPU reads it.
#[derive(Debug)]
pub struct Pinned {
    device: Arc<Device>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to the value like that of a Vec; the driver's calls work from any thread.
unsafe impl Send for Pinned {}
// SAFETY: shared references only read.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Allocates zeroed memory.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where the system does not lock so much.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Pinned> {
        /// Pinned for every context.
        const PORTABLE: u32 = 1;
        let _bound = device.bind()?;
        let driver_error = |error: DriverError| {
            let action = format!("lock {} of the host's memory for copies", megabytes(bytes));
            match error.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    let reason =
                        "the system has not so much to lock: free memory of the host, or raise its limit".into();
                    Error::Cuda { device: device.number(), action, reason }
                }
                _ => device.driver_error(&action)(error),
            }
        };
        // SAFETY: the device's context is current.
        let start = unsafe { result::malloc_host(bytes.max(1), PORTABLE) }.map_err(driver_error)?.cast::<u8>();
        // SAFETY: so many bytes were just allocated.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Pinned { device: device.clone(), start, bytes })
    }

    /// The bytes.
    ///
    /// # Safety
    /// No copy or kernel that writes into them is under way.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: allocated, initialised, and by the caller's promise nobody writes.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// The bytes, to write.
    ///
    /// # Safety
    /// No copy or kernel that reads or writes them is under way.
    pub unsafe fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and borrowed for us alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Its address, which is valid on the device too: the address space is one.
    pub(super) fn address(&self) -> u64 {
        self.start.addr() as u64
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let Ok(_bound) = self.device.bind() else { return };
        // SAFETY: allocated by `new` and freed once; its owners wait for copies first.
        let _ = unsafe { result::free_host(self.start.cast::<c_void>()) };
    }
}

/// Queues a copy from pinned memory to a device.
///
/// # Safety
/// `from..from + bytes` lies in `pinned`, `to..` in memory of the stream's device; both live, and the source stays as it
/// is, until the copy has run.
pub(super) unsafe fn copy_in(
    device: &Device,
    stream: &CudaStream,
    to: u64,
    pinned: &Pinned,
    from: usize,
    bytes: usize,
) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: within the allocation by the caller's promise; only its address is used now.
    let source = unsafe { std::slice::from_raw_parts(pinned.start.add(from), bytes) };
    // SAFETY: the caller's promise.
    unsafe { result::memcpy_htod_async(to, source, stream.cu_stream()) }
        .map_err(device.driver_error("copy to the device"))
}

/// Queues a copy from a device to pinned memory.
///
/// # Safety
/// `to..to + bytes` lies in `pinned`, `from..` in memory of the stream's device; both live, and nobody reads the
/// destination, until the copy has run.
pub(super) unsafe fn copy_out(
    device: &Device,
    stream: &CudaStream,
    pinned: &Pinned,
    to: usize,
    from: u64,
    bytes: usize,
) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: within the allocation by the caller's promise, and nobody else looks at it meanwhile.
    let target = unsafe { std::slice::from_raw_parts_mut(pinned.start.add(to), bytes) };
    // SAFETY: the caller's promise.
    unsafe { result::memcpy_dtoh_async(target, from, stream.cu_stream()) }
        .map_err(device.driver_error("copy to the host"))
}

/// Queues a copy within a device.
///
/// # Safety
/// Both ranges lie in memory of the stream's device and live until the copy has run.
pub(super) unsafe fn copy_within(device: &Device, stream: &CudaStream, to: u64, from: u64, bytes: usize) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }
        .map_err(device.driver_error("copy within the device"))
}

/// A number of bytes for people.
pub(super) fn megabytes(bytes: usize) -> String {
    if bytes < 1_000_000 { format!("{bytes} bytes") } else { format!("{:.1} MB", bytes as f64 / 1e6) }
}
