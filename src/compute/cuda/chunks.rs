//! Tables of chunks: all tensors cut into pieces of about one size, so that one launch takes any number of them.

use std::sync::Arc;

use cudarc::driver::{CudaStream, result};

use super::kernels::Chunk;
use super::{Buffer, Device};
use crate::error::Result;

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
    buffer: Option<Buffer>,
}

impl Table {
    pub(super) fn new(device: &Arc<Device>) -> Table {
        Table { device: device.clone(), chunks: Vec::new(), buffer: None }
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    pub(super) fn address(&self) -> u64 {
        self.buffer.as_ref().map_or(0, Buffer::address)
    }

    /// Queues the upload of another table. All earlier launches that read the old one come before in `stream`'s order.
    pub(super) fn set(&mut self, stream: &CudaStream, chunks: Vec<Chunk>) -> Result<()> {
        if chunks == self.chunks {
            return Ok(());
        }
        let bytes: &[u8] = bytemuck::cast_slice(&chunks);
        if self.buffer.as_ref().is_none_or(|buffer| buffer.len() < bytes.len()) {
            self.chunks.clear();
            self.buffer = None;
            self.buffer = Some(Buffer::new(&self.device, bytes.len(), "the table of tensors")?);
        }
        let _bound = self.device.bind()?;
        // SAFETY: the buffer is large enough and ours. The source is pageable: the driver has taken it when this returns.
        unsafe { result::memcpy_htod_async(self.address(), bytes, stream.cu_stream()) }
            .map_err(self.device.refused("copy the table of tensors to the device"))?;
        self.chunks = chunks;
        Ok(())
    }
}
