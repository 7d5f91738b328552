//! Look for NaN and infinity in the parameters of an update, on their device.
//!
//! A kernel writes what it finds to device memory, where the update reads it. A copy follows to the host.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::CudaStream;

use super::device::Event;
use super::kernels::{JoinArgs, LookArgs, MAX_JOINED};
use super::memory::copy_to_host;
use super::{Buffer, CudaDevice, Pinned};
use crate::error::{Error, Result};

/// Key in device memory that stands for no element (`NOTHING_FOUND`).
pub(super) const NOTHING_FOUND: u64 = u64::MAX;

/// Result of a look, on the device and on the host.
#[derive(Debug)]
pub(super) struct Look {
    device: Arc<CudaDevice>,
    /// Key of the first element that was found. Updates do nothing unless it is [`NOTHING_FOUND`].
    found: Buffer,
    /// Copy of the key on the host.
    pinned: Arc<Pinned>,
    /// Event that passes when the newest copy has run, for looks that other devices join.
    fetched: Event,
    /// True unless the key is known to be [`NOTHING_FOUND`].
    may_be_set: AtomicBool,
    /// Copies of the keys of other devices. They may have set this key too, of which its own copy knows nothing.
    joined: Vec<Arc<Pinned>>,
}

/// First element that a look has found.
#[derive(Debug, PartialEq)]
pub(super) struct FoundElement {
    /// Index of its chunk in the table.
    pub chunk: usize,
    /// Index in the chunk.
    pub element: usize,
    pub value: f64,
}

impl Look {
    /// Allocates all memory of later looks.
    pub(super) fn new(device: &Arc<CudaDevice>) -> Result<Look> {
        let found = Buffer::new(device, size_of::<u64>(), "the look at parameters")?;
        let pinned = Arc::new(Pinned::new(device, size_of::<u64>())?);
        let (fetched, may_be_set) = (device.order_event()?, AtomicBool::new(true));
        Ok(Look { device: device.clone(), found, pinned, fetched, may_be_set, joined: Vec::new() })
    }

    /// Returns the address of the key on the device.
    pub(super) fn address(&self) -> u64 {
        self.found.address()
    }

    /// Queues that nothing is found, unless that is known already.
    pub(super) fn reset(&self, stream: &CudaStream) -> Result<()> {
        if self.may_be_set.load(Ordering::Relaxed) {
            self.found.fill(stream, 0xff)?;
            self.may_be_set.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Queues a look at the parameters in the first `chunks` chunks of the table at an address.
    ///
    /// # Safety
    /// The parameters may be read in the order of `stream`.
    pub(super) unsafe fn queue(&self, stream: &CudaStream, table: u64, chunks: usize) -> Result<()> {
        self.reset(stream)?;
        let args = LookArgs { chunks: table, found: self.found.address() };
        self.may_be_set.store(true, Ordering::Relaxed);
        // SAFETY: we own the key and the table, which are freed after the update has run. The caller guarantees the
        // rest.
        unsafe { self.device.kernels.look(stream, &args, chunks) }
            .map_err(self.device.driver_error("launch the look at the parameters"))
    }

    /// Queues the copy of the key to the host.
    pub(super) fn fetch(&self, stream: &CudaStream) -> Result<()> {
        // SAFETY: both have that many bytes. The host reads after it has waited for the update.
        unsafe { copy_to_host(&self.device, stream, &self.pinned, 0, self.found.address(), size_of::<u64>()) }
    }

    /// Queues the copy of the key to the host, for looks of other devices that join this one.
    pub(super) fn publish(&self, stream: &CudaStream) -> Result<()> {
        self.fetch(stream)?;
        self.fetched.record(stream).map_err(self.device.driver_error("record an event"))
    }

    /// Queues that what other devices have found counts, too, after their looks have been published.
    ///
    /// The owner waits for it before a drop. It misses what others have found if they look again before it has run.
    pub(super) fn join(&mut self, stream: &CudaStream, others: &[&Look]) -> Result<()> {
        self.may_be_set.store(true, Ordering::Relaxed);
        for other in others {
            if !self.joined.iter().any(|pinned| Arc::ptr_eq(pinned, &other.pinned)) {
                self.joined.push(other.pinned.clone());
            }
        }
        for others in others.chunks(MAX_JOINED) {
            let mut args = JoinArgs { found: self.found.address(), count: others.len() as u64, ..Default::default() };
            for (place, other) in args.others.iter_mut().zip(others) {
                stream.wait(&other.fetched).map_err(self.device.driver_error("order two devices"))?;
                *place = other.pinned.start().addr() as u64;
            }
            // SAFETY: we own the key, and share the copies. Memory that the driver has pinned has the same address on
            // every device.
            unsafe { self.device.kernels.join_looks(stream, &args) }
                .map_err(self.device.driver_error("launch the join of looks"))?;
        }
        Ok(())
    }

    /// Returns the element that the newest look has found.
    ///
    /// # Safety
    /// The copy of [`Look::fetch`] has run.
    pub(super) unsafe fn found(&self) -> Result<Option<FoundElement>> {
        // SAFETY: guaranteed by the caller.
        let bytes = unsafe { self.pinned.bytes() };
        let key: u64 = bytemuck::pod_read_unaligned(bytes);
        let found = FoundElement::of(key)?;
        if found.is_none() && self.joined.is_empty() {
            self.may_be_set.store(false, Ordering::Relaxed);
        }
        Ok(found)
    }
}

impl FoundElement {
    /// Returns the element that a key of the kernels stands for; none for [`NOTHING_FOUND`].
    pub(super) fn of(key: u64) -> Result<Option<FoundElement>> {
        if key == NOTHING_FOUND {
            return Ok(None);
        }
        let rest = key as u32;
        let value = match rest % 4 {
            0 => f64::NAN,
            1 => f64::INFINITY,
            2 => f64::NEG_INFINITY,
            _ => return Err(Error::Internal(format!("a look at parameters has found {key:#x}"))),
        };
        Ok(Some(FoundElement { chunk: (key >> 32) as usize, element: (rest / 4) as usize, value }))
    }
}
