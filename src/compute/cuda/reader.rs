//! Reads of averages from a device, after the newest update.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result;
use safetensors::Dtype;

use super::arenas::Arenas;
use super::chunks::{ChunkTable, TensorSpan, chunk_size, split_into_chunks};
use super::device::{Event, Stream};
use super::kernels::{ConvertArgs, ScanArgs, kind};
use super::staging::{BLOCK, Staging};
use super::{Buffer, CudaDevice};
use crate::compute::cpu::{Averages, ValueRange, scan};
use crate::error::Result;

/// Reader of averages on a device. The next update must not start before it is done.
#[derive(Debug)]
pub struct AveragesReader {
    arenas: Arc<Arenas>,
    stream: Stream,
    /// Pinned buffers, and the number of bytes that they were allocated for.
    staging: Option<(usize, Staging)>,
    /// Table of all tensors and memory for the results of a scan.
    scan: Option<(ChunkTable, Buffer)>,
}

impl AveragesReader {
    pub(super) fn new(arenas: Arc<Arenas>, stream: Stream) -> AveragesReader {
        AveragesReader { arenas, stream, staging: None, scan: None }
    }

    /// Orders all later reads after an event.
    pub(super) fn wait_for(&self, event: &Event) -> Result<()> {
        let _bound = self.device().bind()?;
        self.stream.wait(event).map_err(self.device().driver_error("order two streams"))
    }

    fn device(&self) -> &Arc<CudaDevice> {
        &self.arenas.device
    }

    /// Returns the value range of every tensor, by profile.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the device fails.
    pub fn ranges(&mut self) -> Result<Vec<Vec<ValueRange>>> {
        let arenas = self.arenas.clone();
        let device = self.device().clone();
        let (table, largest) = match self.scan.take() {
            Some(scan) => scan,
            None => self.prepare_scan()?,
        };
        let mut all = Vec::with_capacity(arenas.high.len());
        for (profile, high) in arenas.high.iter().enumerate() {
            largest.clear(&self.stream)?;
            let args = ScanArgs { chunks: table.address(), high: high.address(), largest: largest.address() };
            let bound = device.bind()?;
            // SAFETY: we own all three, and they live until `read` below has waited for the stream.
            unsafe { device.kernels.scan(&self.stream, &args, table.len()) }
                .map_err(device.driver_error("launch the scan"))?;
            drop(bound);
            let mut bits = vec![0u32; arenas.layout.len()];
            self.read(bytemuck::cast_slice_mut(&mut bits), largest.address())?;
            let ranges = bits.iter().enumerate().map(|(i, &bits)| self.value_range(profile, i, f32::from_bits(bits)));
            all.push(ranges.collect::<Result<_>>()?);
        }
        self.scan = Some((table, largest));
        Ok(all)
    }

    fn prepare_scan(&self) -> Result<(ChunkTable, Buffer)> {
        let device = self.device();
        let layout = &self.arenas.layout;
        let most = chunk_size(device, layout.total());
        let mut chunks = Vec::new();
        for i in 0..layout.len() {
            let range = layout.range(i);
            // The "address" is the tensor's index, which does not advance from chunk to chunk.
            let span = TensorSpan { address: i as u64, offset: range.start as u64, elements: range.len(), kind: 0 };
            split_into_chunks(&mut chunks, span, 0, 1, most);
        }
        let mut table = ChunkTable::new(device)?;
        table.set(&self.stream, chunks)?;
        Ok((table, Buffer::new(device, 4 * layout.len(), "the ranges of averages")?))
    }

    /// Returns the range of one tensor from its largest magnitude. If that is not finite, the host scans the values.
    fn value_range(&mut self, profile: usize, tensor: usize, largest: f32) -> Result<ValueRange> {
        if largest.is_finite() {
            return Ok(ValueRange { largest, first_not_finite: None });
        }
        let range = self.arenas.layout.range(tensor);
        let mut values = vec![0f32; range.len()];
        self.read(bytemuck::cast_slice_mut(&mut values), self.arenas.address(profile, range.start))?;
        Ok(scan(&values))
    }

    /// Returns one value of the f32 part.
    ///
    /// # Errors
    /// As [`AveragesReader::ranges`].
    pub fn value(&self, profile: usize, tensor: usize, element: usize) -> Result<f32> {
        let device = self.device();
        let _bound = device.bind()?;
        let from = self.arenas.address(profile, self.arenas.layout.range(tensor).start + element);
        let mut value = [0f32];
        // SAFETY: the element is within the arena, and the value is read after the stream has been waited for.
        unsafe { result::memcpy_dtoh_async(&mut value, from, self.stream.cu_stream()) }
            .and_then(|()| self.stream.synchronize())
            .map_err(device.driver_error("read an average"))?;
        Ok(value[0])
    }

    /// Returns the averages of one profile, with their low-order terms.
    ///
    /// # Errors
    /// As [`AveragesReader::ranges`].
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
    /// As [`AveragesReader::ranges`].
    pub fn copies(&mut self) -> Result<Vec<Vec<u8>>> {
        let arenas = self.arenas.clone();
        let mut all = vec![0; arenas.copies.len()];
        self.read(&mut all, arenas.copies.address())?;
        Ok(arenas.copy_ranges.iter().map(|range| all[range.clone()].to_vec()).collect())
    }

    /// Returns the averages of one profile, each tensor converted on the device to its dtype, and the range of each
    /// tensor in the bytes.
    ///
    /// # Errors
    /// As [`AveragesReader::ranges`].
    pub fn converted(&mut self, profile: usize, dtypes: &[Dtype]) -> Result<(Vec<u8>, Vec<Range<usize>>)> {
        let layout = self.arenas.layout.clone();
        let mut bytes = Vec::new();
        let mut ranges = Vec::with_capacity(dtypes.len());
        // Neighbours of one dtype are converted together, with the few elements of padding between them.
        let mut first = 0;
        for run in dtypes.chunk_by(|a, b| a == b) {
            let size = run[0].bitsize() / 8;
            let start = layout.range(first).start;
            let end = layout.range(first + run.len() - 1).end;
            let before = bytes.len();
            for range in (first..first + run.len()).map(|i| layout.range(i)) {
                ranges.push(before + (range.start - start) * size..before + (range.end - start) * size);
            }
            bytes.resize(before + (end - start) * size, 0);
            self.convert(&mut bytes[before..], profile, start, run[0])?;
            first += run.len();
        }
        Ok((bytes, ranges))
    }

    /// Fills `dst` with averages in `dtype`, from element `start` of the arena on.
    fn convert(&mut self, dst: &mut [u8], profile: usize, start: usize, dtype: Dtype) -> Result<()> {
        let arenas = self.arenas.clone();
        let stream = Arc::clone(&self.stream);
        let size = dtype.bitsize() / 8;
        self.staging(dst.len())?.fetch(&stream, dst, &mut |stage, from, bytes| {
            let element = start + from / size;
            let high = arenas.address(profile, element);
            let low = arenas.low.get(profile).map_or(0, |low| low.address() + 2 * element as u64);
            let aligned = u32::from(high.is_multiple_of(16) && low.is_multiple_of(8));
            let to = stage.scratch(&arenas.device)?;
            let args = ConvertArgs { high, low, to, elements: (bytes / size) as u64, output: kind(dtype), aligned };
            // SAFETY: it is within the arena and the scratch, which live until `fetch` has waited for the stream.
            unsafe { arenas.device.kernels.convert(&stream, &args) }
                .map_err(arenas.device.driver_error("launch the conversion"))?;
            Ok(to)
        })
    }

    /// Reads bytes of the device from an address on.
    fn read(&mut self, dst: &mut [u8], from: u64) -> Result<()> {
        let stream = Arc::clone(&self.stream);
        self.staging(dst.len())?.fetch(&stream, dst, &mut |_, start, _| Ok(from + start as u64))
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
        let _bound = self.device().bind();
        let _ = self.stream.synchronize();
    }
}
