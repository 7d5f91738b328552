//! Copies between pageable host memory and a device, in blocks through two pinned buffers. All threads fill or empty
//! one buffer while the other is on the bus.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use rayon::prelude::*;

use super::device::Event;
use super::memory::{copy_to_device, copy_to_host};
use super::{CudaDevice, Pinned};
use crate::error::Result;
use crate::tensor::{CudaMemory, CudaMemoryMut};

/// Bytes of a block, large enough to saturate the bus. Twice as much host memory is locked.
pub(super) const BLOCK: usize = 32 << 20;

/// Bytes per task of a copy from or to a pinned buffer.
const PIECE: usize = 1 << 20;

/// Pair of pinned buffers for copies between host and device.
#[derive(Debug)]
pub struct Staging {
    device: Arc<CudaDevice>,
    stages: [Stage; 2],
}

/// Pinned buffer of one block.
#[derive(Debug)]
struct Stage {
    pinned: Pinned,
    /// Event that passes when the newest copy has run.
    done: Event,
}

impl Staging {
    /// Allocates buffers for copies of up to `bytes` bytes, at most [`BLOCK`]. Longer copies take several blocks.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the memory cannot be locked.
    pub fn new(device: &Arc<CudaDevice>, bytes: usize) -> Result<Staging> {
        let bytes = bytes.clamp(1, BLOCK);
        let stage = || Ok(Stage { pinned: Pinned::new(device, bytes)?, done: device.event()? });
        Ok(Staging { device: device.clone(), stages: [stage()?, stage()?] })
    }

    /// Returns the device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Reads device memory of another library, in the order of its stream, and waits.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the device fails.
    pub fn read(&mut self, memory: &CudaMemory<'_>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; memory.bytes];
        let stream = self.device.borrow_stream(memory.stream)?;
        self.fetch(&stream, &mut bytes, memory.address)?;
        Ok(bytes)
    }

    /// Writes device memory of another library, which is as long as `bytes`, in the order of its stream, and waits.
    ///
    /// # Errors
    /// As [`Staging::read`].
    pub fn write(&mut self, memory: &CudaMemoryMut<'_>, bytes: &[u8]) -> Result<()> {
        let memory = &memory.0;
        let stream = self.device.borrow_stream(memory.stream)?;
        // SAFETY: the memory is lent for writing, and is not written past its end.
        unsafe { self.send(&stream, memory.address, &bytes[..bytes.len().min(memory.bytes)]) }
    }

    /// Copies bytes to the device and waits.
    ///
    /// # Safety
    /// `to` points to as many bytes of the device's memory, which may be written in the order of `stream`.
    pub(super) unsafe fn send(&mut self, stream: &CudaStream, to: u64, bytes: &[u8]) -> Result<()> {
        let _bound = self.device.bind()?;
        let block = self.stages[0].pinned.len();
        for (i, bytes) in bytes.chunks(block).enumerate() {
            let stage = &mut self.stages[i % 2];
            stage.wait(&self.device)?;
            stage.fill(bytes);
            // SAFETY: the caller guarantees the destination. The buffer has that many bytes and is not reused before
            // the copy has run.
            unsafe { copy_to_device(&self.device, stream, to + (i * block) as u64, &stage.pinned, 0, bytes.len()) }?;
            stage.mark(&self.device, stream)?;
        }
        self.stages.iter().try_for_each(|stage| stage.wait(&self.device))
    }

    /// Copies bytes of the device, from an address on, to the host, and waits.
    pub(super) fn fetch(&mut self, stream: &CudaStream, dst: &mut [u8], from: u64) -> Result<()> {
        let _bound = self.device.bind()?;
        let size = self.stages[0].pinned.len();
        let mut pending: [Option<&mut [u8]>; 2] = [None, None];
        for (i, block) in dst.chunks_mut(size).enumerate() {
            let stage = &mut self.stages[i % 2];
            if let Some(earlier) = pending[i % 2].take() {
                stage.empty(&self.device, earlier)?;
            }
            let from = from + (i * size) as u64;
            // SAFETY: the block is not longer than the buffer, which is not read before `empty` has waited.
            unsafe { copy_to_host(&self.device, stream, &stage.pinned, 0, from, block.len()) }?;
            stage.mark(&self.device, stream)?;
            pending[i % 2] = Some(block);
        }
        for (stage, block) in self.stages.iter().zip(pending) {
            if let Some(block) = block {
                stage.empty(&self.device, block)?;
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After an error, copies may still be running. An error here was already reported.
        let _ = self.stages.iter().try_for_each(|stage| stage.wait(&self.device));
    }
}

impl Stage {
    /// Records the end of the copy that was just queued. If that fails, it waits for the copy instead.
    fn mark(&self, device: &CudaDevice, stream: &CudaStream) -> Result<()> {
        let recorded = self.done.record(stream);
        if recorded.is_err() {
            let _ = stream.synchronize();
        }
        recorded.map_err(device.driver_error("record an event"))
    }

    fn wait(&self, device: &CudaDevice) -> Result<()> {
        let _bound = device.bind()?;
        self.done.synchronize().map_err(device.driver_error("copy between host and device"))
    }

    /// Copies bytes into the pinned buffer with all threads.
    fn fill(&mut self, bytes: &[u8]) {
        // SAFETY: the buffer's newest copy is done.
        let pinned = unsafe { self.pinned.bytes_mut() };
        pinned[..bytes.len()]
            .par_chunks_mut(PIECE)
            .zip(bytes.par_chunks(PIECE))
            .for_each(|(to, from)| to.copy_from_slice(from));
    }

    /// Waits for the copy and moves its bytes to `block` with all threads.
    fn empty(&self, device: &CudaDevice, block: &mut [u8]) -> Result<()> {
        self.wait(device)?;
        // SAFETY: the copy has run, and the next one is queued later.
        let bytes = unsafe { &self.pinned.bytes()[..block.len()] };
        block.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }
}
