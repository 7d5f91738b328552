//! Page-locked host memory, for copies that run concurrently with the host and with other work of the device.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};
use rayon::prelude::*;

use super::CudaDevice;
use super::device::format_bytes;
use crate::error::{Error, Result};
use crate::fs::{MemoryRoom, keep_from_children, memory_room, use_large_pages};

/// Flag that pins memory for every context.
const PORTABLE: u32 = 1;

/// Bytes from which memory is allocated here and registered. The driver would clear all of it with one thread.
const LARGE: usize = 4 << 20;

/// Alignment of registered memory: that of a huge page.
const ALIGNMENT: usize = 2 << 20;

/// Largest page of any system. Registered memory shares none with other data.
const PAGE: usize = 64 << 10;

/// Page-locked host memory.
///
/// It is cached, not write-combined, because the CPU reads it.
#[derive(Debug)]
pub struct Pinned {
    device: Arc<CudaDevice>,
    start: *mut u8,
    bytes: usize,
    /// Allocation that was registered; none if the driver has allocated the memory.
    registered: Option<Registered>,
}

/// Allocation of this process, of which the driver has pinned a range.
#[derive(Debug)]
struct Registered {
    allocation: *mut [u8],
    range: Range<usize>,
}

// SAFETY: the value owns the memory like a `Vec`, and the driver's calls work from any thread.
unsafe impl Send for Pinned {}
// SAFETY: shared references only read.
unsafe impl Sync for Pinned {}

/// Refuses to take more of the host's memory than the process may: the system would end the process.
///
/// # Errors
/// [`Error::Cuda`], which names the bytes, the limit and what to do.
pub fn check_host_memory(device: &CudaDevice, bytes: usize, purpose: &str) -> Result<()> {
    let Some(MemoryRoom { free, limit }) = memory_room() else { return Ok(()) };
    if u64::try_from(bytes).is_ok_and(|bytes| bytes <= free) {
        return Ok(());
    }
    let free = usize::try_from(free).unwrap_or(usize::MAX);
    let reason = format!(
        "{limit} leaves {}: raise the limit or free memory of the host, or keep the averages on the device",
        format_bytes(free)
    );
    Err(Error::Cuda { device: device.number(), action: format!("take {} for {purpose}", format_bytes(bytes)), reason })
}

impl Pinned {
    /// Allocates zeroed memory.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the system does not lock that much memory.
    pub fn new(device: &Arc<CudaDevice>, bytes: usize) -> Result<Pinned> {
        let _bound = device.bind()?;
        if bytes >= LARGE {
            check_host_memory(device, bytes, "copies, locked")?;
            if let Some(pinned) = Pinned::registered(device, bytes) {
                return Ok(pinned);
            }
        }
        let allocation_error = |error: DriverError| {
            let action = format!("lock {} of the host's memory for copies", format_bytes(bytes));
            match error.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    let reason = "the system cannot lock that much: free memory of the host, or raise the limit".into();
                    Error::Cuda { device: device.number(), action, reason }
                }
                _ => device.driver_error(&action)(error),
            }
        };
        // SAFETY: the device's context is current.
        let start = unsafe { result::malloc_host(bytes.max(1), PORTABLE) }.map_err(allocation_error)?.cast::<u8>();
        // SAFETY: that many bytes were just allocated.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Pinned { device: device.clone(), start, bytes, registered: None })
    }

    /// Allocates memory in huge pages, clears it with all threads, and lets the driver pin it. Returns none if the
    /// system or the driver refuses.
    fn registered(device: &Arc<CudaDevice>, bytes: usize) -> Option<Pinned> {
        let whole = bytes.checked_next_multiple_of(PAGE)?;
        let mut memory: Vec<u8> = bytemuck::allocation::try_zeroed_vec(whole.checked_add(ALIGNMENT)?).ok()?;
        let begin = memory.as_ptr().align_offset(ALIGNMENT);
        let range = begin..begin.checked_add(whole)?;
        let pages = memory.get_mut(range.clone())?;
        use_large_pages(pages);
        pages.par_chunks_mut(ALIGNMENT).for_each(|chunk| chunk.fill(0));
        // A process that is forked would share the pages, and a later write here would move them away from the device.
        keep_from_children(pages, true);
        let registered = Registered { allocation: Box::into_raw(memory.into_boxed_slice()), range };
        let start = registered.start();
        // SAFETY: the device's context is current, and the range is within the allocation, which lives until after it
        // is unregistered.
        let pinned = unsafe { sys::cuMemHostRegister_v2(start.cast::<c_void>(), whole, PORTABLE) }.result();
        match pinned {
            Ok(()) => Some(Pinned { device: device.clone(), start, bytes, registered: Some(registered) }),
            Err(error) => {
                tracing::debug!("cuda:{}: memory is not registered: {error}", device.number());
                // SAFETY: nothing else uses the allocation.
                unsafe { registered.free() };
                None
            }
        }
    }

    /// Returns the bytes for reading.
    ///
    /// # Safety
    /// No pending copy or kernel writes to them.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: they are allocated and initialised, and the caller guarantees that nothing writes to them.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// Returns the bytes for writing.
    ///
    /// # Safety
    /// No pending copy or kernel reads or writes them.
    pub unsafe fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Returns true if the size is 0.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Returns the first byte's address on the host.
    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }
}

impl Registered {
    fn start(&self) -> *mut u8 {
        // SAFETY: the range is within the allocation.
        unsafe { self.allocation.cast::<u8>().add(self.range.start) }
    }

    /// Frees the allocation.
    ///
    /// # Safety
    /// It is not pinned, and nothing uses it any more.
    unsafe fn free(self) {
        // SAFETY: it came from a box and is freed once.
        let mut memory = unsafe { Box::from_raw(self.allocation) };
        // The allocator may give the pages to other data, which children need.
        keep_from_children(&mut memory[self.range], false);
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let Ok(_bound) = self.device.bind() else { return };
        let Some(registered) = self.registered.take() else {
            // SAFETY: it was allocated by `new` and is freed once. The owner waits for copies before.
            let _ = unsafe { result::free_host(self.start.cast::<c_void>()) };
            return;
        };
        // SAFETY: it was registered by `registered`, and the owner waits for copies before.
        let unpinned = unsafe { sys::cuMemHostUnregister(self.start.cast::<c_void>()) }.result();
        if unpinned.is_ok() {
            // SAFETY: nothing uses it any more. Memory that stays pinned is not given back.
            unsafe { registered.free() };
        }
    }
}
