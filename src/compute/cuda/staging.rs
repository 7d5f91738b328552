//! Copies between ordinary host memory and a device: in blocks, through two pinned buffers, so that one is filled or
//! emptied by all threads while the other is on the bus.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use rayon::prelude::*;

use super::device::Event;
use super::memory::{Pinned, copy_in, copy_out};
use super::{Buffer, Device};
use crate::error::Result;
use crate::tensor::{CudaMemory, CudaMemoryMut};

/// Bytes of a block: long enough for the bus; twice as much of the host's memory is locked.
pub(super) const BLOCK: usize = 32 << 20;

/// Bytes that one thread moves from or to a pinned buffer at a time.
const PIECE: usize = 1 << 20;

/// Two pinned buffers and what goes with them.
#[derive(Debug)]
pub struct Staging {
    device: Arc<Device>,
    stages: [Stage; 2],
}

/// A buffer on either side of the bus.
#[derive(Debug)]
pub(super) struct Stage {
    pinned: Pinned,
    /// Where values are converted before they travel, made when it is first asked for.
    scratch: Option<Buffer>,
    /// Passes when the newest copy has run.
    done: Event,
}

/// Queues whatever makes some bytes, given by their place in the whole and their number, and tells where they will lie.
pub(super) type Make<'m> = dyn FnMut(&mut Stage, usize, usize) -> Result<u64> + 'm;

impl Staging {
    /// Prepares for copies of up to so many bytes at a time; longer ones go in several blocks.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where the memory cannot be locked.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Staging> {
        let bytes = bytes.clamp(1, BLOCK);
        let stage = || Ok(Stage { pinned: Pinned::new(device, bytes)?, scratch: None, done: device.event()? });
        Ok(Staging { device: device.clone(), stages: [stage()?, stage()?] })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Reads somebody's memory, in the order of its stream; the host waits.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where the device fails.
    pub fn read(&mut self, memory: &CudaMemory<'_>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; memory.bytes];
        let stream = self.device.borrow_stream(memory.stream);
        self.fetch(&stream, &mut bytes, &mut |_, start, _| Ok(memory.address + start as u64))?;
        Ok(bytes)
    }

    /// Writes somebody's memory, which is as long, in the order of its stream; the host waits.
    ///
    /// # Errors
    /// As [`Staging::read`].
    pub fn write(&mut self, memory: &CudaMemoryMut<'_>, bytes: &[u8]) -> Result<()> {
        let memory = &memory.0;
        let stream = self.device.borrow_stream(memory.stream);
        // SAFETY: the memory is lent for writing, and is used up to its end at most.
        unsafe { self.send(&stream, memory.address, &bytes[..bytes.len().min(memory.bytes)]) }
    }

    /// Copies to the device; the host waits.
    ///
    /// # Safety
    /// From `to` on, as many bytes of the device's memory are ours to write in the order of `stream`.
    pub(super) unsafe fn send(&mut self, stream: &CudaStream, to: u64, bytes: &[u8]) -> Result<()> {
        let _bound = self.device.bind()?;
        let block = self.stages[0].pinned.len();
        for (i, bytes) in bytes.chunks(block).enumerate() {
            let stage = &mut self.stages[i % 2];
            stage.wait(&self.device)?;
            stage.fill(bytes);
            // SAFETY: the caller's promise; the buffer is that long, and is waited for before it is used again.
            unsafe { copy_in(&self.device, stream, to + (i * block) as u64, &stage.pinned, 0, bytes.len()) }?;
            stage.mark(&self.device, stream)?;
        }
        self.stages.iter().try_for_each(|stage| stage.wait(&self.device))
    }

    /// Copies to the host what `make` makes; the host waits.
    pub(super) fn fetch(&mut self, stream: &CudaStream, dst: &mut [u8], make: &mut Make<'_>) -> Result<()> {
        let _bound = self.device.bind()?;
        let size = self.stages[0].pinned.len();
        let mut under_way: [Option<&mut [u8]>; 2] = [None, None];
        for (i, block) in dst.chunks_mut(size).enumerate() {
            let stage = &mut self.stages[i % 2];
            if let Some(earlier) = under_way[i % 2].take() {
                stage.empty(&self.device, earlier)?;
            }
            let from = make(stage, i * size, block.len())?;
            // SAFETY: the block is no longer than the buffer; nobody looks at it before `empty` has waited.
            unsafe { copy_out(&self.device, stream, &stage.pinned, 0, from, block.len()) }?;
            stage.mark(&self.device, stream)?;
            under_way[i % 2] = Some(block);
        }
        let stages = self.stages.iter().zip(under_way);
        stages
            .filter_map(|(stage, block)| Some((stage, block?)))
            .try_for_each(|(stage, block)| stage.empty(&self.device, block))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After an error copies may still be under way. What fails now failed before.
        let _ = self.stages.iter().try_for_each(|stage| stage.wait(&self.device));
    }
}

impl Stage {
    /// Memory on the device for as many bytes as the pinned buffer has.
    pub(super) fn scratch(&mut self, device: &Arc<Device>) -> Result<u64> {
        if let Some(scratch) = &self.scratch {
            return Ok(scratch.address());
        }
        let scratch = Buffer::new(device, self.pinned.len(), "the conversion of averages")?;
        Ok(self.scratch.insert(scratch).address())
    }

    /// Marks the end of the copy that was just queued; where that fails, nothing may be under way behind our back.
    fn mark(&self, device: &Device, stream: &CudaStream) -> Result<()> {
        let recorded = self.done.record(stream);
        if recorded.is_err() {
            let _ = stream.synchronize();
        }
        recorded.map_err(device.driver_error("record an event"))
    }

    fn wait(&self, device: &Device) -> Result<()> {
        let _bound = device.bind()?;
        self.done.synchronize().map_err(device.driver_error("copy between host and device"))
    }

    fn fill(&mut self, bytes: &[u8]) {
        // SAFETY: the buffer's newest copy has been waited for.
        let pinned = unsafe { self.pinned.bytes_mut() };
        pinned[..bytes.len()]
            .par_chunks_mut(PIECE)
            .zip(bytes.par_chunks(PIECE))
            .for_each(|(to, from)| to.copy_from_slice(from));
    }

    /// Waits for the copy and moves its bytes on.
    fn empty(&self, device: &Device, block: &mut [u8]) -> Result<()> {
        self.wait(device)?;
        // SAFETY: the copy has run, and the next is queued after this.
        let bytes = unsafe { &self.pinned.bytes()[..block.len()] };
        block.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }
}
