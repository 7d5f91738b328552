//! Tables of chunks: all tensors cut into pieces of about one size, so that one launch takes any number of them.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::device::Event;
use super::kernels::Chunk;
use super::memory::copy_in;
use super::{Buffer, Device, Pinned};
use crate::error::{Error, Result};

/// The most and the fewest elements of a chunk: below, starting a block costs more than its work.
const SIZES: (usize, usize) = (1 << 16, 1 << 11);

/// Blocks for each multiprocessor, so that the last to finish is not far behind the others.
const BLOCKS: usize = 16;

/// The size into which `elements` elements are cut on a device: many blocks for each multiprocessor, where there are
/// enough elements. A multiple of the smallest, so that chunks of an aligned tensor are aligned.
pub(super) fn chunk_size(device: &Device, elements: usize) -> usize {
    let (most, least) = SIZES;
    (elements / (device.multiprocessors() * BLOCKS)).next_multiple_of(least).clamp(least, most)
}

/// Cuts one tensor; `size` is that of an element in its memory, `step` that in the place `offset` counts in.
pub(super) fn cut(chunks: &mut Vec<Chunk>, tensor: Chunk64, size: usize, step: usize, most: usize) {
    let Chunk64 { address, offset, elements, kind } = tensor;
    for start in (0..elements).step_by(most) {
        chunks.push(Chunk {
            address: address + (start * size) as u64,
            offset: offset + (start * step) as u64,
            elements: most.min(elements - start) as u32,
            kind,
        });
    }
}

/// A whole tensor, as long as it may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk64 {
    pub address: u64,
    pub offset: u64,
    pub elements: usize,
    pub kind: u32,
}

/// A table on the device, uploaded only when it differs from what is there.
#[derive(Debug)]
pub(super) struct Table {
    device: Arc<Device>,
    chunks: Vec<Chunk>,
    /// What the copy to the device reads: pinned, so that the call returns at once.
    pinned: Option<Pinned>,
    buffer: Option<Buffer>,
    /// Passes when the newest upload has run.
    uploaded: Event,
}

impl Table {
    pub(super) fn new(device: &Arc<Device>) -> Result<Table> {
        let uploaded = device.event()?;
        Ok(Table { device: device.clone(), chunks: Vec::new(), pinned: None, buffer: None, uploaded })
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    pub(super) fn address(&self) -> u64 {
        self.buffer.as_ref().map_or(0, Buffer::address)
    }

    /// Queues the upload of another table, after the one before has run: whoever moves tensors at every update is at most
    /// one update ahead of the device. All earlier launches that read the old one come before in `stream`'s order.
    pub(super) fn set(&mut self, stream: &CudaStream, chunks: Vec<Chunk>) -> Result<()> {
        if chunks == self.chunks {
            return Ok(());
        }
        // Whatever fails from here on, the old table is not there any more.
        self.chunks.clear();
        let _bound = self.device.bind()?;
        self.uploaded.synchronize().map_err(self.device.driver_error("upload the table of tensors"))?;
        let bytes: &[u8] = bytemuck::cast_slice(&chunks);
        let device = self.device.clone();
        let (pinned, buffer) = self.room(bytes.len())?;
        // SAFETY: the newest upload, the only work that reads it, has been waited for.
        unsafe { &mut pinned.bytes_mut()[..bytes.len()] }.copy_from_slice(bytes);
        let (pinned, to) = (&*pinned, buffer.address());
        // SAFETY: both are so long; the pinned one is waited for before it changes or goes.
        unsafe { copy_in(&device, stream, to, pinned, 0, bytes.len()) }?;
        let recorded = self.uploaded.record(stream);
        if recorded.is_err() {
            let _ = stream.synchronize();
        }
        recorded.map_err(self.device.driver_error("record an event"))?;
        self.chunks = chunks;
        Ok(())
    }

    /// Memory on both sides for so many bytes.
    fn room(&mut self, bytes: usize) -> Result<(&mut Pinned, &Buffer)> {
        if self.buffer.as_ref().is_none_or(|buffer| buffer.len() < bytes) {
            let bytes = bytes.next_power_of_two();
            (self.pinned, self.buffer) = (None, None);
            self.pinned = Some(Pinned::new(&self.device, bytes)?);
            self.buffer = Some(Buffer::new(&self.device, bytes, "the table of tensors")?);
        }
        match (&mut self.pinned, &self.buffer) {
            (Some(pinned), Some(buffer)) => Ok((pinned, buffer)),
            _ => Err(Error::Internal("there is no room for the table of tensors".into())),
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // Pinned memory must not be given back under a copy. What fails now failed before.
        let _bound = self.device.bind();
        let _ = self.uploaded.synchronize();
    }
}
