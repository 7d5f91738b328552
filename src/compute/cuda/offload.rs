//! Parameters on their way from a device to averages on the host: copied once, in their own dtype, on a stream of our
//! own, into pinned memory, while training goes on.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::Device;
use super::averages::common;
use super::chunks::{Chunk64, Table, chunk_size, cut};
use super::device::{Event, Stream};
use super::kernels::{GatherArgs, KIND_BYTES};
use super::memory::{Pinned, copy_out};
use crate::error::{Error, Result};
use crate::tensor::CudaMemory;

/// Copies that may be under way or waiting to be folded at a time.
const SLOTS: usize = 2;

/// Tensors below this size in bytes are gathered by a kernel that writes through the bus: thousands of small copies would
/// each cost more than their bytes.
const SMALL: usize = 1 << 20;

/// Copies the parameters of one model from a device.
#[derive(Debug)]
pub struct Offload {
    device: Arc<Device>,
    stream: Stream,
    small: Table,
    /// Where each tensor lies in a slot, at 16 bytes.
    places: Arc<[Range<usize>]>,
    /// Passes when the parameters may be read.
    begin: Event,
    free: Arc<Free>,
}

/// The slots that are not in use.
#[derive(Debug)]
struct Free {
    slots: Mutex<Vec<Slot>>,
    returned: Condvar,
}

/// Pinned memory for all parameters.
#[derive(Debug)]
struct Slot {
    pinned: Pinned,
    /// Passes when the copy into it has run.
    done: Arc<Event>,
    device: Arc<Device>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The memory must not be given back under a copy. What fails now failed before.
        let _bound = self.device.bind();
        let _ = self.done.synchronize();
    }
}

/// A copy of the parameters that is under way.
#[derive(Debug)]
pub struct PendingCopy {
    slot: Option<Slot>,
    free: Arc<Free>,
    places: Arc<[Range<usize>]>,
}

/// A copy of the parameters that has arrived.
#[derive(Debug)]
pub struct HostCopy(PendingCopy);

/// Passes when the parameters of the newest update have been read, and may be changed.
#[derive(Clone, Debug)]
pub struct Fence {
    device: Arc<Device>,
    done: Arc<Event>,
}

impl Offload {
    /// Prepares for tensors of these sizes in bytes: twice as much of the host's memory is locked.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where that is refused.
    pub fn new(device: &Arc<Device>, sizes: &[usize]) -> Result<Offload> {
        let mut end = 0;
        let mut place = |&bytes: &usize| {
            let start = end;
            end += bytes.next_multiple_of(16);
            start..start + bytes
        };
        let places: Arc<[Range<usize>]> = sizes.iter().map(&mut place).collect();
        let slot = |_| {
            let (pinned, done) = (Pinned::new(device, end)?, Arc::new(device.event()?));
            Ok(Slot { pinned, done, device: device.clone() })
        };
        let slots = (0..SLOTS).map(slot).collect::<Result<Vec<_>>>()?;
        Ok(Offload {
            stream: device.stream()?,
            small: Table::new(device)?,
            places,
            begin: device.order_event()?,
            free: Arc::new(Free { slots: Mutex::new(slots), returned: Condvar::new() }),
            device: device.clone(),
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Queues a copy of all tensors, in the order of the sizes given to [`Offload::new`].
    ///
    /// It returns at once, unless both earlier copies wait to be folded still. The stream that the tensors came with waits
    /// for the copy, unless they are lent until the fence.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where tensors lie on several devices or come with several streams, and where the driver
    /// refuses.
    pub fn copy(&mut self, tensors: &[CudaMemory<'_>]) -> Result<(PendingCopy, Fence)> {
        let device = self.device.clone();
        let (number, stream) = common(tensors.iter())?.unwrap_or((device.number(), 0));
        device.check_is(number)?;
        let fits = |(memory, place): (&CudaMemory<'_>, &Range<usize>)| memory.bytes == place.len();
        if tensors.len() != self.places.len() || !tensors.iter().zip(self.places.iter()).all(fits) {
            let reason = "the tensors are not those that the copy was prepared for".into();
            return Err(Error::Cuda { device: number, action: "read the parameters".into(), reason });
        }
        let staged = PendingCopy { slot: Some(self.free.take()), free: self.free.clone(), places: self.places.clone() };
        let _bound = device.bind()?;
        let owner = device.borrow_stream(stream);
        let order = || device.driver_error("order two streams");
        self.begin.record(&owner).map_err(order())?;
        self.stream.wait(&self.begin).map_err(order())?;
        if let Some(slot) = &staged.slot {
            let queued = self.queue(slot, tensors).and_then(|()| slot.done.record(&self.stream).map_err(order()));
            if queued.is_err() {
                // Nothing may be under way that no event tells of.
                let _ = self.stream.synchronize();
            }
            queued?;
            if tensors.iter().any(|memory| !memory.until_fence) {
                owner.wait(&slot.done).map_err(order())?;
            }
        }
        let fence = Fence { device: device.clone(), done: staged.done().clone() };
        Ok((staged, fence))
    }

    fn queue(&mut self, slot: &Slot, tensors: &[CudaMemory<'_>]) -> Result<()> {
        let most = chunk_size(&self.device, slot.pinned.len()).max(1 << 14);
        let mut chunks = Vec::new();
        for (memory, place) in tensors.iter().zip(self.places.iter()) {
            if memory.bytes < SMALL {
                let (address, offset, elements) = (memory.address, place.start as u64, memory.bytes);
                cut(&mut chunks, Chunk64 { address, offset, elements, kind: KIND_BYTES }, 1, 1, most);
            }
        }
        // Before the copies: where tensors have moved, it waits for its last upload, which then waits for none of them.
        self.small.set(&self.stream, chunks)?;
        for (memory, place) in tensors.iter().zip(self.places.iter()).filter(|(memory, _)| memory.bytes >= SMALL) {
            // SAFETY: a place is as long as its tensor, and the slot is not looked at before `done` has passed.
            unsafe { copy_out(&self.device, &self.stream, &slot.pinned, place.start, memory.address, memory.bytes) }?;
        }
        let count = self.small.len() as u64;
        let args = GatherArgs { chunks: self.small.address(), to: slot.pinned.address(), count };
        // SAFETY: as above; pinned memory has one address on both sides.
        unsafe { self.device.kernels.gather(&self.stream, &args) }
            .map_err(self.device.driver_error("launch the gathering of small tensors"))
    }
}

impl Free {
    fn take(&self) -> Slot {
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
            None => unreachable!("a slot is given back only when its owner is dropped"),
        }
    }

    /// Waits until the copy has arrived.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where it failed.
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
    /// The bytes of a tensor.
    pub fn tensor(&self, i: usize) -> &[u8] {
        let Some(slot) = &self.0.slot else { return &[] };
        // SAFETY: the copy has run, and the slot takes another only after it is given back.
        let all = unsafe { slot.pinned.bytes() };
        &all[self.0.places[i].clone()]
    }
}

impl Fence {
    /// Makes a stream of the device, given as a `CUstream`'s number, wait; the host goes on.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where the driver refuses.
    ///
    /// # Safety
    /// The stream belongs to the device's primary context and exists.
    pub unsafe fn wait_on(&self, stream: usize) -> Result<()> {
        let _bound = self.device.bind()?;
        self.device.borrow_stream(stream).wait(&self.done).map_err(self.device.driver_error("order two streams"))
    }

    /// Waits on the host.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where the copy failed.
    pub fn wait(&self) -> Result<()> {
        let _bound = self.device.bind()?;
        self.done.synchronize().map_err(self.device.driver_error("copy the parameters to the host"))
    }
}
