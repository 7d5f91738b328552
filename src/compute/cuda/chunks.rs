//! Tables of chunks: tensors split into pieces of similar size, so that one launch handles any number of tensors.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::device::Event;
use super::kernels::Chunk;
use super::memory::copy_to_device;
use super::{Buffer, CudaDevice, Pinned};
use crate::error::{Error, Result};

/// Variable that sets the number of elements of a chunk, to compare sizes. Averages do not depend on it.
const CHUNK_VARIABLE: &str = "POSTHOC_EMA_CUDA_CHUNK";

/// Largest number of elements of a chunk. A block of threads goes 16 times around in it, which hides its start.
const MAX_CHUNK: usize = 1 << 15;

/// Largest number of elements that [`CHUNK_VARIABLE`] may set.
const MAX_CHOSEN: usize = 1 << 24;

/// Smallest number of elements into which a tensor is split. Below it, starting a block costs more than its work.
const MIN_CHUNK: usize = 1 << 11;

/// Number of blocks per multiprocessor, so that the last block does not finish long after the others. Four or five run
/// at a time.
const BLOCKS: usize = 32;

/// Returns the chunk size for `elements` elements in total: many blocks per multiprocessor if there are enough
/// elements.
///
/// It is a multiple of [`MIN_CHUNK`], so chunks of an aligned tensor are aligned.
///
/// # Errors
/// [`Error::Setting`] if [`CHUNK_VARIABLE`] is set to another number.
pub(super) fn chunk_size(device: &CudaDevice, elements: usize) -> Result<usize> {
    match std::env::var_os(CHUNK_VARIABLE) {
        Some(text) => chosen_size(&text.to_string_lossy()),
        None => Ok(size_for(device.multiprocessors(), elements)),
    }
}

fn size_for(multiprocessors: usize, elements: usize) -> usize {
    (elements / (multiprocessors * BLOCKS)).next_multiple_of(MIN_CHUNK).clamp(MIN_CHUNK, MAX_CHUNK)
}

fn chosen_size(text: &str) -> Result<usize> {
    let size = text.trim().parse().ok().filter(|size: &usize| size.is_multiple_of(MIN_CHUNK));
    size.filter(|size| (MIN_CHUNK..=MAX_CHOSEN).contains(size)).ok_or_else(|| Error::Setting {
        option: CHUNK_VARIABLE,
        reason: format!("{text} is not a chunk size: give a multiple of {MIN_CHUNK} up to {MAX_CHOSEN}, or unset it"),
    })
}

/// Splits a tensor into chunks of at most `most` elements.
///
/// For each element, the address advances by `size` and the offset by `step`.
pub(super) fn split_into_chunks(chunks: &mut Vec<Chunk>, span: TensorSpan, size: usize, step: usize, most: usize) {
    let TensorSpan { address, offset, elements, kind } = span;
    for start in (0..elements).step_by(most) {
        chunks.push(Chunk {
            address: address + (start * size) as u64,
            offset: offset + (start * step) as u64,
            elements: most.min(elements - start) as u32,
            kind,
        });
    }
}

/// Whole tensor of any size, in the terms of a [`Chunk`].
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorSpan {
    pub address: u64,
    pub offset: u64,
    pub elements: usize,
    pub kind: u32,
}

/// Table of chunks on the device, uploaded only if it has changed.
#[derive(Debug)]
pub(super) struct ChunkTable {
    device: Arc<CudaDevice>,
    chunks: Vec<Chunk>,
    /// Source of the upload, pinned so that the call does not block.
    pinned: Pinned,
    buffer: Buffer,
    /// Event that passes when the newest upload has run.
    uploaded: Event,
}

impl ChunkTable {
    /// Creates a table with room for this many chunks, so that the first update allocates nothing.
    pub(super) fn new(device: &Arc<CudaDevice>, chunks: usize) -> Result<ChunkTable> {
        let bytes = (chunks * size_of::<Chunk>()).next_power_of_two();
        Ok(ChunkTable {
            device: device.clone(),
            chunks: Vec::new(),
            pinned: Pinned::new(device, bytes)?,
            buffer: Buffer::new(device, bytes, "the table of tensors")?,
            uploaded: device.event()?,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Returns the offset of a chunk in the arenas.
    pub(super) fn offset(&self, chunk: usize) -> Option<u64> {
        self.chunks.get(chunk).map(|chunk| chunk.offset)
    }

    pub(super) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Queues the upload of new chunks on `stream`, after the launches there that read the old ones.
    ///
    /// It waits for the previous upload, so a model whose tensors move at every update is at most one update ahead of
    /// the device.
    pub(super) fn set(&mut self, stream: &CudaStream, chunks: Vec<Chunk>) -> Result<()> {
        if chunks == self.chunks {
            return Ok(());
        }
        // After any failure below, the old table is no longer valid.
        self.chunks.clear();
        let _bound = self.device.bind()?;
        self.uploaded.synchronize().map_err(self.device.driver_error("upload the table of tensors"))?;
        let bytes: &[u8] = bytemuck::cast_slice(&chunks);
        self.reserve(stream, bytes.len())?;
        // SAFETY: the newest upload is the only work that reads the pinned memory, and it is done.
        unsafe { &mut self.pinned.bytes_mut()[..bytes.len()] }.copy_from_slice(bytes);
        // SAFETY: both have that many bytes. The pinned memory changes or is freed only after the upload.
        unsafe { copy_to_device(&self.device, stream, self.buffer.address(), &self.pinned, 0, bytes.len()) }?;
        let recorded = self.uploaded.record(stream);
        if recorded.is_err() {
            let _ = stream.synchronize();
        }
        recorded.map_err(self.device.driver_error("record an event"))?;
        self.chunks = chunks;
        Ok(())
    }

    /// Makes room for `bytes` bytes on both sides. It waits for `stream` before it frees smaller memory.
    fn reserve(&mut self, stream: &CudaStream, bytes: usize) -> Result<()> {
        if self.buffer.len() < bytes {
            let bytes = bytes.next_power_of_two();
            let pinned = Pinned::new(&self.device, bytes)?;
            let buffer = Buffer::new(&self.device, bytes, "the table of tensors")?;
            self.device.wait_for(stream, "finish the use of the table of tensors")?;
            self.pinned = pinned;
            self.buffer = buffer;
        }
        Ok(())
    }
}

impl Drop for ChunkTable {
    fn drop(&mut self) {
        // Pinned memory must not be freed during a copy. An error here was already reported.
        let _bound = self.device.bind();
        let _ = self.uploaded.synchronize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_size_fills_all_multiprocessors_and_stays_within_its_bounds() {
        for (multiprocessors, elements, expected) in [
            (132, 0, 2_048),
            (132, 8_000_000, 2_048),
            (132, 10_000_000, 4_096),
            (132, 100_000_000, 24_576),
            (132, 1_000_000_000, 32_768),
            (40, 100_000_000, 32_768),
        ] {
            let size = size_for(multiprocessors, elements);
            assert_eq!(size, expected, "{elements} elements on {multiprocessors} multiprocessors");
            assert!(elements < multiprocessors * MIN_CHUNK || elements.div_ceil(size) >= multiprocessors);
        }
    }

    #[test]
    fn chosen_chunk_size_must_be_a_multiple() {
        assert_eq!(chosen_size("16384").unwrap(), 16_384);
        for text in ["", "0", "1000", "2049", "-2048", "33554432", "many"] {
            let error = chosen_size(text).unwrap_err().to_string();
            assert!(error.contains(CHUNK_VARIABLE) && error.contains("multiple of 2048"), "{error}");
        }
    }
}
