//! Copies of parameters from a device to averages on the host.
//!
//! Parameters are copied in their own dtype into pinned memory, on a separate stream, while training continues.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::CudaDevice;
use super::averages::common_stream;
use super::chunks::{ChunkTable, TensorSpan, chunk_size, split_into_chunks};
use super::device::{Event, Stream};
use super::kernels::{GatherArgs, KIND_BYTES};
use super::memory::{Pinned, copy_to_host};
use crate::error::{Error, Result};
use crate::tensor::CudaMemory;

/// Largest number of copies that run or wait to be folded.
const SLOTS: usize = 2;

/// Size in bytes below which tensors are gathered by a kernel that writes to host memory. Each of thousands of small
/// copies would cost more than the transfer of its bytes.
const SMALL: usize = 1 << 20;

/// Most bytes of one copy. A copy of the training, such as that of a loss, waits for at most one.
const PIECE: usize = 8 << 20;

/// Copier of one model's parameters from a device.
#[derive(Debug)]
pub struct Offload {
    device: Arc<CudaDevice>,
    stream: Stream,
    /// Chunks of the tensors below [`SMALL`].
    small: ChunkTable,
    /// Range of each tensor in a slot, aligned to 16 bytes.
    ranges: Arc<[Range<usize>]>,
    /// Event that passes when the parameters may be read.
    begin: Event,
    free: Arc<FreeSlots>,
}

/// Slots that are not in use.
#[derive(Debug)]
struct FreeSlots {
    slots: Mutex<Vec<CopySlot>>,
    returned: Condvar,
}

/// Pinned memory for all parameters.
#[derive(Debug)]
struct CopySlot {
    pinned: Pinned,
    /// Event that passes when the copy into the slot has run.
    done: Arc<Event>,
    device: Arc<CudaDevice>,
}

impl Drop for CopySlot {
    fn drop(&mut self) {
        // Pinned memory must not be freed during a copy. An error here was already reported.
        let _bound = self.device.bind();
        let _ = self.done.synchronize();
    }
}

/// Copy of the parameters that has not arrived yet.
#[derive(Debug)]
pub struct PendingCopy {
    slot: Option<CopySlot>,
    free: Arc<FreeSlots>,
    ranges: Arc<[Range<usize>]>,
}

/// Copy of the parameters that has arrived on the host.
#[derive(Debug)]
pub struct HostCopy(PendingCopy);

/// Fence that passes when the parameters of the newest update have been read and may be changed.
#[derive(Clone, Debug)]
pub struct Fence {
    device: Arc<CudaDevice>,
    done: Arc<Event>,
}

/// Returns the size in bytes of the chunks of small tensors, among `total` bytes.
fn small_chunk_size(device: &CudaDevice, total: usize) -> usize {
    chunk_size(device, total).max(1 << 14)
}

impl Offload {
    /// Prepares to copy tensors of these sizes in bytes. It locks twice as much host memory.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the driver or the system rejects it.
    pub fn new(device: &Arc<CudaDevice>, sizes: &[usize]) -> Result<Offload> {
        let mut ranges = Vec::with_capacity(sizes.len());
        let mut end = 0;
        for &bytes in sizes {
            ranges.push(end..end + bytes);
            end += bytes.next_multiple_of(16);
        }
        let mut slots = Vec::with_capacity(SLOTS);
        for _ in 0..SLOTS {
            let pinned = Pinned::new(device, end)?;
            slots.push(CopySlot { pinned, done: Arc::new(device.event()?), device: device.clone() });
        }
        let most = small_chunk_size(device, end);
        let chunks = sizes.iter().filter(|bytes| **bytes < SMALL).map(|bytes| bytes.div_ceil(most)).sum();
        Ok(Offload {
            stream: device.stream()?,
            small: ChunkTable::new(device, chunks)?,
            ranges: ranges.into(),
            begin: device.order_event()?,
            free: Arc::new(FreeSlots { slots: Mutex::new(slots), returned: Condvar::new() }),
            device: device.clone(),
        })
    }

    /// Returns the device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Queues a copy of all tensors, in the order of the sizes given to [`Offload::new`].
    ///
    /// It blocks only while both earlier copies still wait to be folded. The stream of the tensors waits for the copy,
    /// unless they are lent until the fence.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if tensors are on several devices or have several streams, or if the driver fails.
    pub fn copy(&mut self, tensors: &[CudaMemory<'_>]) -> Result<(PendingCopy, Fence)> {
        let device = self.device.clone();
        let (number, stream) = common_stream(tensors.iter())?.unwrap_or((device.number(), 0));
        device.check_number(number)?;
        let fits = |(memory, range): (&CudaMemory<'_>, &Range<usize>)| memory.bytes == range.len();
        if tensors.len() != self.ranges.len() || !tensors.iter().zip(self.ranges.iter()).all(fits) {
            let reason = "the tensors differ from those that the copy was prepared for".into();
            return Err(Error::Cuda { device: number, action: "read the parameters".into(), reason });
        }
        let owner = device.borrow_stream(stream)?;
        let pending =
            PendingCopy { slot: Some(self.free.take()), free: self.free.clone(), ranges: self.ranges.clone() };
        let _bound = device.bind()?;
        let order = || device.driver_error("order two streams");
        self.begin.record(&owner).map_err(order())?;
        self.stream.wait(&self.begin).map_err(order())?;
        if let Some(slot) = &pending.slot {
            let queued = self.queue(slot, tensors).and_then(|()| slot.done.record(&self.stream).map_err(order()));
            if queued.is_err() {
                // No event covers the queued work, so it is waited for.
                let _ = self.stream.synchronize();
            }
            queued?;
            if tensors.iter().any(|memory| !memory.until_fence) {
                owner.wait(&slot.done).map_err(order())?;
            }
        }
        let fence = Fence { device: device.clone(), done: pending.done().clone() };
        Ok((pending, fence))
    }

    /// Queues the copy of all tensors into a slot.
    fn queue(&mut self, slot: &CopySlot, tensors: &[CudaMemory<'_>]) -> Result<()> {
        let most = small_chunk_size(&self.device, slot.pinned.len());
        let mut chunks = Vec::new();
        for (memory, range) in tensors.iter().zip(self.ranges.iter()) {
            if memory.bytes < SMALL {
                let span = TensorSpan {
                    address: memory.address,
                    offset: range.start as u64,
                    elements: memory.bytes,
                    kind: KIND_BYTES,
                };
                split_into_chunks(&mut chunks, span, 1, 1, most);
            }
        }
        // The table comes before the copies: if tensors have moved, this waits for the previous upload, which must not
        // be queued behind large copies.
        self.small.set(&self.stream, chunks)?;
        for (memory, range) in tensors.iter().zip(self.ranges.iter()).filter(|(memory, _)| memory.bytes >= SMALL) {
            for start in (0..memory.bytes).step_by(PIECE) {
                let (to, from) = (range.start + start, memory.address + start as u64);
                let bytes = PIECE.min(memory.bytes - start);
                // SAFETY: a range is as long as its tensor, and the slot is not read before `done` has passed.
                unsafe { copy_to_host(&self.device, &self.stream, &slot.pinned, to, from, bytes) }?;
            }
        }
        let count = self.small.len() as u64;
        let args = GatherArgs { chunks: self.small.address(), to: slot.pinned.address(), count };
        // SAFETY: as above. Pinned memory has the same address on both sides.
        unsafe { self.device.kernels.gather(&self.stream, &args) }
            .map_err(self.device.driver_error("launch the gathering of small tensors"))
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        // A pending copy may still read the table of small tensors. An error here was already reported.
        let _bound = self.device.bind();
        let _ = self.stream.synchronize();
    }
}

impl FreeSlots {
    fn take(&self) -> CopySlot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match slots.pop() {
                Some(slot) => return slot,
                None => slots = self.returned.wait(slots).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl PendingCopy {
    fn done(&self) -> &Arc<Event> {
        match &self.slot {
            Some(slot) => &slot.done,
            None => unreachable!("only `drop` takes the slot"),
        }
    }

    /// Waits until the copy has arrived.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the copy failed.
    pub fn wait(self) -> Result<HostCopy> {
        if let Some(slot) = &self.slot {
            let _bound = slot.device.bind()?;
            slot.done.synchronize().map_err(slot.device.driver_error("copy the parameters to the host"))?;
        }
        Ok(HostCopy(self))
    }
}

impl Drop for PendingCopy {
    fn drop(&mut self) {
        let mut slots = self.free.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.extend(self.slot.take());
        self.free.returned.notify_one();
    }
}

impl HostCopy {
    /// Returns the bytes of tensor `i`.
    pub fn tensor(&self, i: usize) -> &[u8] {
        let Some(slot) = &self.0.slot else { return &[] };
        // SAFETY: the copy has run, and the slot takes the next one only after `self` is dropped.
        let all = unsafe { slot.pinned.bytes() };
        &all[self.0.ranges[i].clone()]
    }
}

impl Fence {
    /// Makes a stream of the device wait for the fence. The host does not wait.
    ///
    /// `stream` is a `CUstream` as a number.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the driver fails.
    ///
    /// # Safety
    /// The stream belongs to the device's primary context and exists.
    pub unsafe fn wait_on(&self, stream: usize) -> Result<()> {
        let _bound = self.device.bind()?;
        self.device.borrow_stream(stream)?.wait(&self.done).map_err(self.device.driver_error("order two streams"))
    }

    /// Waits for the fence on the host.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the copy failed.
    pub fn wait(&self) -> Result<()> {
        let _bound = self.device.bind()?;
        self.done.synchronize().map_err(self.device.driver_error("copy the parameters to the host"))
    }
}
