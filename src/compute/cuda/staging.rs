//! Copies between pageable host memory and a device, in blocks through two pinned buffers. All threads fill or empty
//! one buffer while the other is on the bus.

use std::ops::Range;
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

/// Alignment in bytes of the copies in a block.
const ALIGNMENT: usize = 16;

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

    /// Reads memory of another library, as [`Staging::read_all`] does.
    ///
    /// # Errors
    /// As [`Staging::read_all`].
    pub fn read(&mut self, memory: &CudaMemory<'_>) -> Result<Vec<u8>> {
        Ok(self.read_all(std::slice::from_ref(memory))?.pop().unwrap_or_default())
    }

    /// Reads memory of another library, all with the same stream, in the order of that stream, and waits.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the device fails.
    pub fn read_all(&mut self, memory: &[CudaMemory<'_>]) -> Result<Vec<Vec<u8>>> {
        let mut copies: Vec<Vec<u8>> = memory.iter().map(|memory| vec![0; memory.bytes]).collect();
        if let Some(first) = memory.first() {
            let stream = self.device.borrow_stream(first.stream)?;
            let places = memory.iter().zip(&mut copies).map(|(memory, copy)| (memory.address, copy.as_mut_slice()));
            self.fetch_all(&stream, places.collect())?;
        }
        Ok(copies)
    }

    /// Writes memory of another library, each as long as its bytes and all with the same stream, in the order of that
    /// stream, and waits.
    ///
    /// # Errors
    /// As [`Staging::read_all`].
    pub fn write_all(&mut self, writes: &[(CudaMemoryMut<'_>, &[u8])]) -> Result<()> {
        let Some((first, _)) = writes.first() else { return Ok(()) };
        let stream = self.device.borrow_stream(first.0.stream)?;
        let cut = |(memory, bytes): &(CudaMemoryMut<'_>, &'_ [u8])| bytes.len().min(memory.0.bytes);
        let copies = writes.iter().map(|write| (write.0.0.address, &write.1[..cut(write)])).collect::<Vec<_>>();
        // SAFETY: the memory is lent for writing, and is not written past its end.
        unsafe { self.send_all(&stream, &copies) }
    }

    /// Copies bytes to the device and waits.
    ///
    /// # Safety
    /// As [`Staging::send_all`].
    pub(super) unsafe fn send(&mut self, stream: &CudaStream, to: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.send_all(stream, &[(to, bytes)]) }
    }

    /// Copies bytes to addresses of the device and waits. Short ones share a block.
    ///
    /// # Safety
    /// Each address points to as many bytes of the device's memory, which may be written in the order of `stream`.
    unsafe fn send_all(&mut self, stream: &CudaStream, copies: &[(u64, &[u8])]) -> Result<()> {
        let _bound = self.device.bind()?;
        let size = self.stages[0].pinned.len();
        let sizes = copies.iter().map(|(_, bytes)| bytes.len());
        for (i, block) in split_into_blocks(sizes, size).into_iter().enumerate() {
            let stage = &mut self.stages[i % 2];
            stage.wait(&self.device)?;
            let bytes = |piece: &BlockPiece| &copies[piece.copy].1[piece.bytes.clone()];
            stage.fill(block.iter().map(|piece| (piece.at, bytes(piece))));
            let queued = block.iter().try_for_each(|piece| {
                let to = copies[piece.copy].0 + piece.bytes.start as u64;
                // SAFETY: the caller guarantees the destination. The buffer has that many bytes and is not reused
                // before the copy has run.
                unsafe { copy_to_device(&self.device, stream, to, &stage.pinned, piece.at, piece.bytes.len()) }
            });
            stage.mark(&self.device, stream)?;
            queued?;
        }
        self.stages.iter().try_for_each(|stage| stage.wait(&self.device))
    }

    /// Copies bytes of the device, from an address on, to the host, and waits.
    pub(super) fn fetch(&mut self, stream: &CudaStream, dst: &mut [u8], from: u64) -> Result<()> {
        self.fetch_all(stream, vec![(from, dst)])
    }

    /// Copies bytes of the device, from addresses on, to the host, and waits. Short ones share a block.
    fn fetch_all(&mut self, stream: &CudaStream, copies: Vec<(u64, &mut [u8])>) -> Result<()> {
        let _bound = self.device.bind()?;
        let size = self.stages[0].pinned.len();
        let blocks = split_into_blocks(copies.iter().map(|(_, dst)| dst.len()), size);
        let (addresses, mut rest): (Vec<u64>, Vec<&mut [u8]>) = copies.into_iter().unzip();
        let mut pending: [Places<'_>; 2] = [Vec::new(), Vec::new()];
        for (i, block) in blocks.into_iter().enumerate() {
            let stage = &mut self.stages[i % 2];
            stage.empty(&self.device, std::mem::take(&mut pending[i % 2]))?;
            let queued = block.into_iter().try_for_each(|piece| {
                let (place, tail) = std::mem::take(&mut rest[piece.copy]).split_at_mut(piece.bytes.len());
                rest[piece.copy] = tail;
                let from = addresses[piece.copy] + piece.bytes.start as u64;
                pending[i % 2].push((piece.at, place));
                // SAFETY: the block is not longer than the buffer, which is not read before `empty` has waited.
                unsafe { copy_to_host(&self.device, stream, &stage.pinned, piece.at, from, piece.bytes.len()) }
            });
            stage.mark(&self.device, stream)?;
            queued?;
        }
        self.stages.iter().zip(pending).try_for_each(|(stage, places)| stage.empty(&self.device, places))
    }
}

/// Places in host memory, with the offsets of their bytes in a pinned buffer.
type Places<'p> = Vec<(usize, &'p mut [u8])>;

/// Part of a copy, and its place in a block.
#[derive(Debug, PartialEq)]
struct BlockPiece {
    copy: usize,
    bytes: Range<usize>,
    at: usize,
}

/// Splits copies of these sizes in bytes into blocks of at most `block` bytes. A copy may take several blocks.
fn split_into_blocks(sizes: impl Iterator<Item = usize>, block: usize) -> Vec<Vec<BlockPiece>> {
    let mut blocks = Vec::new();
    let mut pieces = Vec::new();
    let mut end = 0;
    for (copy, size) in sizes.enumerate() {
        let mut start = 0;
        while start < size {
            if end >= block {
                blocks.push(std::mem::take(&mut pieces));
                end = 0;
            }
            let bytes = start..size.min(start + block - end);
            start = bytes.end;
            let at = end;
            end = (at + bytes.len()).next_multiple_of(ALIGNMENT);
            pieces.push(BlockPiece { copy, bytes, at });
        }
    }
    blocks.push(pieces);
    blocks
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

    /// Copies bytes to ascending offsets of the pinned buffer, with all threads.
    fn fill<'b>(&mut self, pieces: impl Iterator<Item = (usize, &'b [u8])>) {
        // SAFETY: the buffer's newest copy is done.
        let mut rest = unsafe { self.pinned.bytes_mut() };
        let mut end = 0;
        let mut places = Vec::new();
        for (at, bytes) in pieces {
            let (place, tail) = rest.split_at_mut(at - end).1.split_at_mut(bytes.len());
            (rest, end) = (tail, at + bytes.len());
            places.push((place, bytes));
        }
        copy_all(places);
    }

    /// Waits for the copy and moves its bytes to their places with all threads.
    fn empty(&self, device: &CudaDevice, places: Places<'_>) -> Result<()> {
        if places.is_empty() {
            return Ok(());
        }
        self.wait(device)?;
        // SAFETY: the copy has run, and the next one is queued later.
        let pinned = unsafe { self.pinned.bytes() };
        let mut copies = Vec::with_capacity(places.len());
        for (at, place) in places {
            let bytes = &pinned[at..at + place.len()];
            copies.push((place, bytes));
        }
        copy_all(copies);
        Ok(())
    }
}

/// Copies bytes to places of their sizes, with all threads if there are many.
fn copy_all(places: Vec<(&mut [u8], &[u8])>) {
    let copy = |(to, from): (&mut [u8], &[u8])| to.copy_from_slice(from);
    if places.iter().map(|(to, _)| to.len()).sum::<usize>() < PIECE {
        // Another thread would take longer to wake up.
        return places.into_iter().for_each(copy);
    }
    places.into_par_iter().for_each(|(to, from)| to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(copy));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_share_blocks_and_long_ones_are_split() {
        let piece = |copy, bytes, at| BlockPiece { copy, bytes, at };
        let blocks = split_into_blocks([5, 0, 30, 100, 4].into_iter(), 64);
        let expected = [
            vec![piece(0, 0..5, 0), piece(2, 0..30, 16), piece(3, 0..16, 48)],
            vec![piece(3, 16..80, 0)],
            vec![piece(3, 80..100, 0), piece(4, 0..4, 32)],
        ];
        assert_eq!(blocks, expected);
        for block in [1, 7, 16, 64, 1000] {
            let mut ends = [0; 5];
            for piece in split_into_blocks([5, 0, 30, 100, 4].into_iter(), block).iter().flatten() {
                assert!(piece.bytes.start == ends[piece.copy] && piece.at + piece.bytes.len() <= block);
                ends[piece.copy] = piece.bytes.end;
            }
            assert_eq!(ends, [5, 0, 30, 100, 4]);
        }
    }
}
