//! Reads of averages from a device, after the newest update.

use std::ops::Range;
use std::sync::Arc;

use super::arenas::Arenas;
use super::device::{Event, Stream};
use super::staging::{BLOCK, Staging};
use super::{Buffer, CudaDevice};
use crate::compute::cpu::Averages;
use crate::error::Result;

/// Reader of averages on a device. The next update must not start before it is done.
#[derive(Debug)]
pub struct AveragesReader {
    arenas: Arc<Arenas>,
    stream: Stream,
    /// Pinned buffers, and the number of bytes that they were allocated for.
    staging: Option<(usize, Staging)>,
}

impl AveragesReader {
    pub(super) fn new(arenas: Arc<Arenas>, stream: Stream) -> AveragesReader {
        AveragesReader { arenas, stream, staging: None }
    }

    /// Orders all later reads after an event.
    pub(super) fn wait_for(&self, event: &Event) -> Result<()> {
        let _bound = self.device().bind()?;
        self.stream.wait(event).map_err(self.device().driver_error("order two streams"))
    }

    fn device(&self) -> &Arc<CudaDevice> {
        &self.arenas.device
    }

    /// Allocates the pinned memory of all later reads.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the memory cannot be locked.
    pub fn prepare(&mut self) -> Result<()> {
        let arenas = self.arenas.clone();
        let largest = arenas.high.iter().chain([&arenas.copies]).map(Buffer::len).max().unwrap_or(0);
        self.staging(largest).map(drop)
    }

    /// Returns some elements of the f32 part of one tensor.
    ///
    /// # Errors
    /// As [`AveragesReader::averages`].
    pub fn elements(&mut self, profile: usize, tensor: usize, elements: Range<usize>) -> Result<Vec<f32>> {
        let mut values = vec![0f32; elements.len()];
        let start = self.arenas.layout.range(tensor).start + elements.start;
        self.read(bytemuck::cast_slice_mut(&mut values), self.arenas.address(profile, start))?;
        Ok(values)
    }

    /// Returns the averages of one profile, with their low-order terms.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the device fails.
    pub fn averages(&mut self, profile: usize) -> Result<Averages> {
        let arenas = self.arenas.clone();
        let mut high = vec![0f32; arenas.layout.total()];
        self.read(bytemuck::cast_slice_mut(&mut high), arenas.high[profile].address())?;
        let low = arenas.low.get(profile).map(|from| {
            let mut low = vec![0i16; arenas.layout.total()];
            self.read(bytemuck::cast_slice_mut(&mut low), from.address()).map(|()| low)
        });
        Ok(Averages { high, low: low.transpose()? })
    }

    /// Returns the tensors that are copied.
    ///
    /// # Errors
    /// As [`AveragesReader::averages`].
    pub fn copies(&mut self) -> Result<Vec<Vec<u8>>> {
        let arenas = self.arenas.clone();
        let mut all = vec![0; arenas.copies.len()];
        self.read(&mut all, arenas.copies.address())?;
        Ok(arenas.copy_ranges.iter().map(|range| all[range.clone()].to_vec()).collect())
    }

    /// Reads bytes of the device from an address on.
    fn read(&mut self, dst: &mut [u8], from: u64) -> Result<()> {
        let stream = Arc::clone(&self.stream);
        self.staging(dst.len())?.fetch(&stream, dst, from)
    }

    /// Returns the pinned buffers, large enough for `bytes` bytes or for a whole block.
    fn staging(&mut self, bytes: usize) -> Result<&mut Staging> {
        let staging = match self.staging.take() {
            Some((size, staging)) if size >= bytes.min(BLOCK) => (size, staging),
            _ => (bytes, Staging::new(self.device(), bytes)?),
        };
        Ok(&mut self.staging.insert(staging).1)
    }
}

impl Drop for AveragesReader {
    fn drop(&mut self) {
        // After an error, copies may still be running. An error here was already reported.
        let _ = self.device().wait_for(&self.stream, "read the averages");
    }
}
