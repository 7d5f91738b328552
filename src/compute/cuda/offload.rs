//! Copies of parameters from a device to averages on the host.
//!
//! Parameters are copied in their own dtype into pinned memory, on a separate stream, while training continues. Small
//! tensors are gathered in a buffer of the device before, so that no kernel runs for as long as the bus takes. If the
//! buffer has room for all tensors, they are copied there first, and the training waits for that alone.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use cudarc::driver::CudaStream;

use super::arrangement::{Arrangement, Batch, SMALL, total_bytes};
use super::averages::common_stream;
use super::chunks::{ChunkTable, TensorSpan, chunk_size, split_into_chunks};
use super::device::{Event, Stream};
use super::kernels::{Chunk, GatherArgs, KIND_BYTES};
use super::memory::{copy_on_device, copy_to_host};
use super::{Buffer, CudaDevice, Pinned};
use crate::error::{Error, Result};
use crate::tensor::CudaMemory;

/// Largest number of copies that run or wait to be folded.
const SLOTS: usize = 2;

/// Most bytes of small tensors that are gathered at a time.
const RING: usize = 32 << 20;

/// Most bytes of one copy. A copy of the training, such as that of a loss, waits for at most one.
const PIECE: usize = 8 << 20;

/// Copier of one model's parameters from a device.
#[derive(Debug)]
pub struct Offload {
    device: Arc<CudaDevice>,
    stream: Stream,
    sizes: Vec<usize>,
    arrangement: Arrangement,
    /// Chunks of the small tensors, in the order of the batches.
    small: ChunkTable,
    /// Buffer of the device in which tensors are gathered: all at once if it has room for them, or batches of the small
    /// ones in turns.
    gathered: Buffer,
    /// True if `gathered` has room for all tensors.
    copies_on_device: bool,
    /// Event that passes when the parameters may be read.
    begin: Event,
    /// Event that passes when the tensors whose owner waits have been read.
    read: Event,
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
    /// Event that passes when all tensors have been read.
    all_read: Arc<Event>,
    /// Event that passes when the copy into the slot has run.
    done: Event,
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

/// Fence that passes when all parameters of the newest update have been read and may be changed.
///
/// Parameters on several devices have one event each.
#[derive(Clone, Debug)]
pub struct Fence(Vec<(Arc<CudaDevice>, Arc<Event>)>);

/// Returns the size in bytes of the chunks of small tensors, among `total` bytes.
fn small_chunk_size(device: &CudaDevice, total: usize) -> Result<usize> {
    Ok(chunk_size(device, total)?.max(1 << 14))
}

impl Offload {
    /// Prepares to copy tensors of these sizes in bytes. It locks twice as much host memory.
    ///
    /// With `copies_on_device`, it takes as much memory of the device: the owner's stream then waits for a copy there
    /// only. Otherwise it takes up to 32 MiB for small tensors, less if the device has less.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] if the device has too little memory, [`Error::Cuda`] if the driver or the system rejects
    /// it.
    pub fn new(device: &Arc<CudaDevice>, sizes: &[usize], copies_on_device: bool) -> Result<Offload> {
        let total = total_bytes(sizes);
        let gathered = if copies_on_device {
            Buffer::new(device, total, "a copy of the parameters")?
        } else {
            ring(device, total_bytes(&sizes.iter().copied().filter(|&bytes| bytes < SMALL).collect::<Vec<_>>()))?
        };
        let most = small_chunk_size(device, total)?;
        let chunks = sizes.iter().filter(|bytes| **bytes < SMALL).map(|bytes| bytes.div_ceil(most)).sum();
        let small = ChunkTable::new(device, chunks)?;
        let mut slots = Vec::with_capacity(SLOTS);
        for _ in 0..SLOTS {
            let (all_read, done) = (Arc::new(device.event()?), device.event()?);
            slots.push(CopySlot { pinned: Pinned::new(device, total)?, all_read, done, device: device.clone() });
        }
        let stream = device.stream()?;
        // Copies take the bytes between tensors along.
        gathered.clear(&stream)?;
        Ok(Offload {
            stream,
            arrangement: Arrangement::new(sizes, vec![true; sizes.len()], gathered.len().max(SMALL)),
            sizes: sizes.to_vec(),
            small,
            gathered,
            copies_on_device,
            begin: device.order_event()?,
            read: device.order_event()?,
            free: Arc::new(FreeSlots { slots: Mutex::new(slots), returned: Condvar::new() }),
            device: device.clone(),
        })
    }

    /// Returns the device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Returns true if each copy begins with one within the device.
    pub fn copies_on_device(&self) -> bool {
        self.copies_on_device
    }

    /// Returns the bytes of host memory that copies of tensors of these sizes lock.
    pub fn pinned_bytes(sizes: &[usize]) -> usize {
        SLOTS * total_bytes(sizes)
    }

    /// Returns the bytes of device memory that tensors are gathered in.
    pub fn device_bytes(&self) -> usize {
        self.gathered.len()
    }

    /// Queues a copy of all tensors, in the order of the sizes given to [`Offload::new`].
    ///
    /// It blocks only while both earlier copies still wait to be folded. The stream of the tensors waits until those
    /// have been read that are not lent until the fence.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if tensors are on several devices or have several streams, or if the driver fails.
    pub fn copy(&mut self, tensors: &[CudaMemory<'_>]) -> Result<(PendingCopy, Fence)> {
        let device = self.device.clone();
        let (number, stream) = common_stream(tensors.iter())?.unwrap_or((device.number(), 0));
        device.check_number(number)?;
        if !tensors.iter().map(|memory| memory.bytes).eq(self.sizes.iter().copied()) {
            let reason = "the tensors differ from those that the copy was prepared for".into();
            return Err(Error::Cuda { device: number, action: "read the parameters".into(), reason });
        }
        let owner = device.borrow_stream(stream)?;
        let ordered: Vec<bool> = tensors.iter().map(|memory| !memory.until_fence).collect();
        if ordered != self.arrangement.ordered {
            self.arrangement = Arrangement::new(&self.sizes, ordered, self.gathered.len().max(SMALL));
        }
        let slot = self.free.take();
        let fence = Fence(vec![(device.clone(), slot.all_read.clone())]);
        let ranges = self.arrangement.ranges.clone();
        let pending = PendingCopy { slot: Some(slot), free: self.free.clone(), ranges };
        let _bound = device.bind()?;
        let order = || device.driver_error("order two streams");
        self.begin.record(&owner).map_err(order())?;
        self.stream.wait(&self.begin).map_err(order())?;
        if let Some(slot) = &pending.slot {
            let queued =
                self.queue(&owner, slot, tensors).and_then(|()| slot.done.record(&self.stream).map_err(order()));
            if queued.is_err() {
                // No event covers the queued work, so it is waited for.
                let _ = self.stream.synchronize();
            }
            queued?;
        }
        Ok((pending, fence))
    }

    /// Queues the copy of all tensors into a slot, and the waits of the owner's stream.
    fn queue(&mut self, owner: &CudaStream, slot: &CopySlot, tensors: &[CudaMemory<'_>]) -> Result<()> {
        let first_chunks = self.tabulate(tensors)?;
        if self.copies_on_device {
            self.gather(0..self.small.len(), self.gathered.address())?;
            for &i in &self.arrangement.large {
                let to = self.gathered.address() + self.arrangement.ranges[i].start as u64;
                // SAFETY: the buffer has room for all tensors, which may be read in the order of the stream.
                unsafe { copy_on_device(&self.device, &self.stream, to, tensors[i].address, tensors[i].bytes) }?;
            }
            self.hold_up(owner)?;
            self.record(&slot.all_read)?;
            return self.drain(slot, 0..slot.pinned.len(), self.gathered.address());
        }
        for ordered in [true, false] {
            let mut holds_up = ordered && self.arrangement.ordered.contains(&true);
            for &i in self.arrangement.large.iter().filter(|&&i| self.arrangement.ordered[i] == ordered) {
                self.drain(slot, self.arrangement.ranges[i].clone(), tensors[i].address)?;
            }
            let batches: Vec<(&Batch, &Range<usize>)> = self
                .arrangement
                .batches
                .iter()
                .zip(&first_chunks)
                .filter(|(batch, _)| batch.ordered == ordered)
                .collect();
            for (k, (batch, chunks)) in batches.iter().enumerate() {
                // Chunks have their offsets in the slot.
                self.gather((*chunks).clone(), self.gathered.address().wrapping_sub(batch.range.start as u64))?;
                if holds_up && k + 1 == batches.len() {
                    self.hold_up(owner)?;
                    holds_up = false;
                }
                self.drain(slot, batch.range.clone(), self.gathered.address())?;
            }
            if holds_up {
                self.hold_up(owner)?;
            }
        }
        self.record(&slot.all_read)
    }

    /// Uploads the chunks of small tensors if they have changed, and returns the chunks of each batch.
    fn tabulate(&mut self, tensors: &[CudaMemory<'_>]) -> Result<Vec<Range<usize>>> {
        let most = small_chunk_size(&self.device, total_bytes(&self.sizes))?;
        let mut chunks = Vec::new();
        let mut of_batches = Vec::with_capacity(self.arrangement.batches.len());
        for batch in &self.arrangement.batches {
            let first = chunks.len();
            for &i in &batch.tensors {
                let (address, elements) = (tensors[i].address, tensors[i].bytes);
                let offset = self.arrangement.ranges[i].start as u64;
                let span = TensorSpan { address, offset, elements, kind: KIND_BYTES };
                split_into_chunks(&mut chunks, span, 1, 1, most);
            }
            of_batches.push(first..chunks.len());
        }
        // The table comes before the copies: if tensors have moved, this waits for the previous upload, which must not
        // be queued behind large copies.
        self.small.set(&self.stream, chunks)?;
        Ok(of_batches)
    }

    /// Queues the gathering of small tensors, by their chunks.
    fn gather(&self, chunks: Range<usize>, to: u64) -> Result<()> {
        let first = self.small.address() + (chunks.start * size_of::<Chunk>()) as u64;
        let args = GatherArgs { chunks: first, to, count: chunks.len() as u64 };
        // SAFETY: the buffer has room for a batch, and the tensors may be read in the order of the stream.
        unsafe { self.device.kernels.gather(&self.stream, &args, self.device.multiprocessors()) }
            .map_err(self.device.driver_error("launch the gathering of small tensors"))
    }

    /// Queues the copy of bytes at an address of the device into a range of a slot.
    fn drain(&self, slot: &CopySlot, range: Range<usize>, from: u64) -> Result<()> {
        for start in (0..range.len()).step_by(PIECE) {
            let bytes = PIECE.min(range.len() - start);
            let from = from + start as u64;
            // SAFETY: the range is within the slot and as long as what is copied. The slot is not read before `done`
            // has passed.
            unsafe { copy_to_host(&self.device, &self.stream, &slot.pinned, range.start + start, from, bytes) }?;
        }
        Ok(())
    }

    /// Makes the owner's stream wait for the work so far, if it changes a tensor before the fence.
    fn hold_up(&self, owner: &CudaStream) -> Result<()> {
        if !self.arrangement.ordered.contains(&true) {
            return Ok(());
        }
        self.record(&self.read)?;
        owner.wait(&self.read).map_err(self.device.driver_error("order two streams"))
    }

    fn record(&self, event: &Event) -> Result<()> {
        event.record(&self.stream).map_err(self.device.driver_error("record an event"))
    }
}

/// Allocates a buffer for small tensors of this many bytes in total. On a full device it is smaller.
fn ring(device: &Arc<CudaDevice>, bytes: usize) -> Result<Buffer> {
    let mut size = bytes.min(RING);
    loop {
        match Buffer::new(device, size, "small parameters on their way to the host") {
            Err(Error::DeviceMemory { .. }) if size > SMALL => size = (size / 2).max(SMALL),
            made => return made,
        }
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        // A pending copy may still read the table of small tensors. An error here was already reported.
        let _ = self.device.wait_for(&self.stream, "copy the parameters to the host");
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
    /// Combines the fences of several devices.
    pub fn of_all(fences: impl IntoIterator<Item = Fence>) -> Fence {
        Fence(fences.into_iter().flat_map(|fence| fence.0).collect())
    }

    /// Returns the numbers of the parameters' devices.
    pub fn devices(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().map(|(device, _)| device.number())
    }

    /// Makes a stream of the parameters' only device wait for the fence. The host does not wait.
    ///
    /// `stream` is a `CUstream` as a number.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the driver fails, or if the parameters are on several devices:
    /// [`Fence::wait_on_device`] is for them.
    ///
    /// # Safety
    /// The stream belongs to the device's primary context and exists.
    pub unsafe fn wait_on(&self, stream: usize) -> Result<()> {
        match &self.0[..] {
            [(device, done)] => wait_for(device, done, stream),
            several => {
                let reason = "the parameters are on several devices: each of them has a stream, which waits by \
                              `wait_on_device`";
                let device = several.first().map_or(0, |(device, _)| device.number());
                Err(Error::Cuda { device, action: "wait for the fence".into(), reason: reason.into() })
            }
        }
    }

    /// Makes a stream of one device wait until the parameters on that device have been read. The host does not wait.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the driver fails.
    ///
    /// # Safety
    /// The stream belongs to the primary context of the device of this number and exists.
    pub unsafe fn wait_on_device(&self, number: usize, stream: usize) -> Result<()> {
        let on_device = self.0.iter().filter(|(device, _)| device.number() == number);
        on_device.into_iter().try_for_each(|(device, done)| wait_for(device, done, stream))
    }

    /// Waits for the fence on the host.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the copy failed.
    pub fn wait(&self) -> Result<()> {
        self.0.iter().try_for_each(|(device, done)| {
            let _bound = device.bind()?;
            done.synchronize().map_err(device.driver_error("copy the parameters to the host"))
        })
    }
}

/// Makes a stream of a device wait for an event of it.
fn wait_for(device: &CudaDevice, done: &Event, stream: usize) -> Result<()> {
    let _bound = device.bind()?;
    device.borrow_stream(stream)?.wait(done).map_err(device.driver_error("order two streams"))
}
