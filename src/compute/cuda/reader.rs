//! Averages on their way from a device to the host, as the newest update left them.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result;
use half::bf16;
use safetensors::Dtype;

use super::averages::Arenas;
use super::chunks::{Chunk64, Table, chunk_size, cut};
use super::device::{Event, Stream};
use super::kernels::{ConvertArgs, ScanArgs, kind};
use super::staging::{BLOCK, Staging};
use super::{Buffer, Device};
use crate::compute::cpu::{self, Averages};
use crate::error::Result;

/// Reads averages from a device; the next update must not run before it is done.
#[derive(Debug)]
pub struct Reader {
    arenas: Arc<Arenas>,
    stream: Stream,
    /// Pinned buffers for copies of up to so many bytes at a time.
    staging: Option<(usize, Staging)>,
    /// What the scan works with: where each tensor lies, and room for the results.
    scan: Option<(Table, Buffer)>,
}

impl Reader {
    pub(super) fn new(arenas: Arc<Arenas>, stream: Stream) -> Reader {
        Reader { arenas, stream, staging: None, scan: None }
    }

    /// Puts all that is read from now on behind an event.
    pub(super) fn wait_for(&self, event: &Event) -> Result<()> {
        let _bound = self.device().bind()?;
        self.stream.wait(event).map_err(self.device().driver_error("order two streams"))
    }

    fn device(&self) -> &Arc<Device> {
        &self.arenas.device
    }

    /// The range of every tensor's values, by profile.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] where the device fails, as of all methods.
    pub fn ranges(&mut self) -> Result<Vec<Vec<cpu::ValueRange>>> {
        let (arenas, device) = (self.arenas.clone(), self.device().clone());
        let (table, largest) = match self.scan.take() {
            Some(scan) => scan,
            None => self.prepare_scan()?,
        };
        let mut all = Vec::with_capacity(arenas.high.len());
        for high in &arenas.high {
            largest.clear(&self.stream)?;
            let args = ScanArgs { chunks: table.address(), high: high.address(), largest: largest.address() };
            let bound = device.bind()?;
            // SAFETY: all three are ours and live until `read` below has waited for the stream.
            unsafe { device.kernels.scan(&self.stream, &args, table.len()) }
                .map_err(device.driver_error("launch the scan"))?;
            drop(bound);
            let mut bits = vec![0u32; arenas.layout.len()];
            self.read(bytemuck::cast_slice_mut(&mut bits), largest.address())?;
            let ranges = bits.iter().enumerate().map(|(i, &bits)| self.range(high, i, f32::from_bits(bits)));
            all.push(ranges.collect::<Result<_>>()?);
        }
        self.scan = Some((table, largest));
        Ok(all)
    }

    fn prepare_scan(&self) -> Result<(Table, Buffer)> {
        let (device, layout) = (self.device(), &self.arenas.layout);
        let (mut chunks, most) = (Vec::new(), chunk_size(device, layout.total()));
        for i in 0..layout.len() {
            let place = layout.place(i);
            let tensor = Chunk64 { address: i as u64, offset: place.start as u64, elements: place.len(), kind: 0 };
            // The "address" is the tensor's index: it does not move on from chunk to chunk.
            cut(&mut chunks, tensor, 0, 1, most);
        }
        let mut table = Table::new(device)?;
        table.set(&self.stream, chunks)?;
        Ok((table, Buffer::new(device, 4 * layout.len(), "the ranges of averages")?))
    }

    /// The range of one tensor, whose largest magnitude is known: where it is not finite, the first such value is sought.
    fn range(&mut self, high: &Buffer, tensor: usize, largest: f32) -> Result<cpu::ValueRange> {
        if largest.is_finite() {
            return Ok(cpu::ValueRange { largest, first_not_finite: None });
        }
        let place = self.arenas.layout.place(tensor);
        let mut values = vec![0f32; place.len()];
        self.read(bytemuck::cast_slice_mut(&mut values), high.address() + 4 * place.start as u64)?;
        Ok(cpu::scan(&values))
    }

    /// One value.
    ///
    /// # Errors
    /// As [`Reader::ranges`].
    pub fn value(&self, profile: usize, tensor: usize, element: usize) -> Result<f32> {
        let device = self.device();
        let _bound = device.bind()?;
        let from = self.arenas.high[profile].address() + 4 * (self.arenas.layout.place(tensor).start + element) as u64;
        let mut value = [0f32];
        // SAFETY: within the arena; the value is looked at after the stream has been waited for.
        unsafe { result::memcpy_dtoh_async(&mut value, from, self.stream.cu_stream()) }
            .and_then(|()| self.stream.synchronize())
            .map_err(device.driver_error("read an average"))?;
        Ok(value[0])
    }

    /// All bits of the averages of one profile.
    ///
    /// # Errors
    /// As [`Reader::ranges`].
    pub fn averages(&mut self, profile: usize) -> Result<Averages> {
        let arenas = self.arenas.clone();
        let mut high = vec![0f32; arenas.layout.total()];
        self.read(bytemuck::cast_slice_mut(&mut high), arenas.high[profile].address())?;
        let low = arenas.low.get(profile).map(|from| {
            let mut low = vec![bf16::ZERO; arenas.layout.total()];
            self.read(bytemuck::cast_slice_mut(&mut low), from.address()).map(|()| low)
        });
        Ok(Averages { high, low: low.transpose()? })
    }

    /// The tensors that are copied, as of the newest update.
    ///
    /// # Errors
    /// As [`Reader::ranges`].
    pub fn copies(&mut self) -> Result<Vec<Vec<u8>>> {
        let arenas = self.arenas.clone();
        let mut all = vec![0; arenas.copies.len()];
        self.read(&mut all, arenas.copies.address())?;
        Ok(arenas.places.iter().map(|place| all[place.clone()].to_vec()).collect())
    }

    /// The averages of one profile, each tensor converted on the device to its dtype, and where each lies in the bytes.
    ///
    /// # Errors
    /// As [`Reader::ranges`].
    pub fn converted(&mut self, profile: usize, dtypes: &[Dtype]) -> Result<(Vec<u8>, Vec<Range<usize>>)> {
        let layout = self.arenas.layout.clone();
        let (mut bytes, mut ranges) = (Vec::new(), Vec::with_capacity(dtypes.len()));
        // Neighbours of one dtype are converted together, with the few elements of padding between them.
        let mut first = 0;
        for run in dtypes.chunk_by(|a, b| a == b) {
            let (size, start, before) = (run[0].bitsize() / 8, layout.place(first).start, bytes.len());
            for place in (first..first + run.len()).map(|i| layout.place(i)) {
                ranges.push(before + (place.start - start) * size..before + (place.end - start) * size);
            }
            let end = layout.place(first + run.len() - 1).end;
            bytes.resize(before + (end - start) * size, 0);
            self.convert(&mut bytes[before..], profile, start, run[0])?;
            first += run.len();
        }
        Ok((bytes, ranges))
    }

    /// Converts averages from element `start` of the arena on.
    fn convert(&mut self, dst: &mut [u8], profile: usize, start: usize, dtype: Dtype) -> Result<()> {
        let (arenas, stream, size) = (self.arenas.clone(), Arc::clone(&self.stream), dtype.bitsize() / 8);
        self.staging(dst.len())?.fetch(&stream, dst, &mut |stage, from, bytes| {
            let at = (start + from / size) as u64;
            let high = arenas.high[profile].address() + 4 * at;
            let low = arenas.low.get(profile).map_or(0, |low| low.address() + 2 * at);
            let aligned = u32::from(high.is_multiple_of(16) && low.is_multiple_of(8));
            let (to, elements) = (stage.scratch(&arenas.device)?, (bytes / size) as u64);
            let args = ConvertArgs { high, low, to, elements, output: kind(dtype), aligned };
            // SAFETY: within the arena and the scratch, which live until `fetch` has waited for the stream.
            unsafe { arenas.device.kernels.convert(&stream, &args) }
                .map_err(arenas.device.driver_error("launch the conversion"))?;
            Ok(to)
        })
    }

    /// Reads bytes as they are.
    fn read(&mut self, dst: &mut [u8], from: u64) -> Result<()> {
        let stream = Arc::clone(&self.stream);
        self.staging(dst.len())?.fetch(&stream, dst, &mut |_, start, _| Ok(from + start as u64))
    }

    /// The pinned buffers, large enough for so many bytes or for a whole block.
    fn staging(&mut self, bytes: usize) -> Result<&mut Staging> {
        let staging = match self.staging.take() {
            Some((size, staging)) if size >= bytes.min(BLOCK) => (size, staging),
            _ => (bytes, Staging::new(self.device(), bytes)?),
        };
        Ok(&mut self.staging.insert(staging).1)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // After an error copies may still be under way. What fails now failed before.
        let _bound = self.device().bind();
        let _ = self.stream.synchronize();
    }
}
