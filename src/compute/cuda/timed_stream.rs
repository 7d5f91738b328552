//! Timed work on a device, for benchmarks: on a separate stream, by the device's clock, on memory with known values.
//!
//! Every call is safe in any order. Destinations are borrowed for writing, work on one stream is ordered, and each call
//! that uses host memory or another stream waits for its end.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{result, sys};
use safetensors::Dtype;

use super::blender::{BlendPart, ResidentBlend};
use super::device::{Event, Stream};
use super::kernels::{MAX_SOURCES, MAX_TARGETS};
use super::memory::{copy_on_device, copy_to_device, copy_to_host};
use super::{Buffer, CudaDevice, DeviceAverages, Offload, Pinned};
use crate::compute::cpu::Averages;
use crate::error::{Error, Result};
use crate::tensor::CudaMemory;

/// CUDA version of the oldest driver with the call that reads the device's clock: 12.8.
const CLOCK: i32 = 12080;

/// Stream for timed work.
#[derive(Debug)]
pub struct TimedStream {
    device: Arc<CudaDevice>,
    stream: Stream,
    begin: Event,
    end: Event,
}

/// Pinned memory that no pending copy uses.
#[derive(Debug)]
pub struct PinnedMemory(Pinned);

impl PinnedMemory {
    /// Allocates zeroed memory.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the system does not lock that much memory.
    pub fn new(device: &Arc<CudaDevice>, bytes: usize) -> Result<PinnedMemory> {
        Pinned::new(device, bytes).map(PinnedMemory)
    }

    /// Returns the bytes for reading.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: only `TimedStream` copies to or from it, and it waits.
        unsafe { self.0.bytes() }
    }

    /// Returns the bytes for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { self.0.bytes_mut() }
    }
}

/// Device memory that a blend needs in addition to sources and results.
#[derive(Debug)]
pub struct BlendWorkspace {
    overflows: Buffer,
    sums: Option<Buffer>,
}

impl BlendWorkspace {
    /// Returns the bytes that the workspace takes on the device.
    pub fn bytes(sources: usize, targets: usize, elements: usize) -> usize {
        let sums = if sources > MAX_SOURCES { 8 * MAX_TARGETS.min(targets) * elements.next_multiple_of(4) } else { 0 };
        8 * targets + sums
    }

    /// Allocates the workspace.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] if the device has too little memory.
    pub fn new(device: &Arc<CudaDevice>, sources: usize, targets: usize, elements: usize) -> Result<BlendWorkspace> {
        let overflows = Buffer::new(device, 8 * targets, "the overflows of a blend")?;
        let bytes = BlendWorkspace::bytes(sources, targets, elements) - overflows.len();
        let sums = (bytes > 0).then(|| Buffer::new(device, bytes, "the sums of a blend")).transpose()?;
        Ok(BlendWorkspace { overflows, sums })
    }
}

impl TimedStream {
    /// Creates a stream on a device.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the driver fails, or is too old to read the device's clock.
    pub fn new(device: &Arc<CudaDevice>) -> Result<TimedStream> {
        let mut version = 0;
        // SAFETY: the device is open, so the driver is there; the pointer is valid for the call.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }
            .result()
            .map_err(device.driver_error("read the driver's version"))?;
        if version < CLOCK {
            let reason = "the driver is older than CUDA 12.8: update the NVIDIA driver".into();
            return Err(Error::Cuda { device: device.number(), action: "read the device's clock".into(), reason });
        }
        let begin = device.event()?;
        let end = device.event()?;
        Ok(TimedStream { device: device.clone(), stream: device.stream()?, begin, end })
    }

    /// Returns the device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Returns the seconds that the device takes for the work that `work` queues on this stream.
    ///
    /// The work is queued twice, and the second round is timed. The host queues it while the device runs the first
    /// round, so the host's own time does not count.
    ///
    /// # Errors
    /// The error of `work`, or [`Error::Cuda`] if the device fails, as in all methods.
    pub fn seconds(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        self.mark(&self.begin)?;
        work()?;
        self.stop()
    }

    fn mark(&self, event: &Event) -> Result<()> {
        let _bound = self.device.bind()?;
        event.record(&self.stream).map_err(self.device.driver_error("record an event"))
    }

    /// Returns the seconds from `begin` to the end of the queued work.
    fn stop(&self) -> Result<f64> {
        self.mark(&self.end)?;
        let _bound = self.device.bind()?;
        let milliseconds = self.begin.elapsed_ms(&self.end).map_err(self.device.driver_error("time its work"))?;
        // The clock has a resolution of half a microsecond. The result is never 0.
        Ok((f64::from(milliseconds) / 1e3).max(1e-7))
    }

    /// Waits until all queued work has run.
    ///
    /// # Errors
    /// [`Error::Cuda`] if some of it failed.
    pub fn wait(&self) -> Result<()> {
        let _bound = self.device.bind()?;
        self.stream.synchronize().map_err(self.device.driver_error("finish its work"))
    }

    /// Lends part of a buffer for reading, in the order of this stream.
    pub fn lend<'a>(&'a self, buffer: &'a Buffer, range: Range<usize>) -> CudaMemory<'a> {
        let stream = self.stream.cu_stream().addr();
        let address = within(buffer, &range);
        buffer.wait_on_drop();
        // SAFETY: the range is within the buffer, which lives for `'a`, as does the stream. Its drop waits for the
        // device. A buffer that is borrowed for reading is not written.
        unsafe { CudaMemory::from_raw(self.device.number(), stream, address, range.len()) }
    }

    /// Queues setting all bytes to `0xff`, which is NaN in every float dtype.
    pub fn poison(&self, buffer: &mut Buffer) -> Result<()> {
        let _bound = self.device.bind()?;
        buffer.wait_on_drop();
        // SAFETY: the buffer has that many bytes, and is borrowed for writing in the stream's order.
        unsafe { result::memset_d8_async(buffer.address(), 0xff, buffer.len(), self.stream.cu_stream()) }
            .map_err(self.device.driver_error("set memory"))
    }

    /// Fills a buffer with repetitions of a pattern, and waits.
    pub fn repeat(&self, to: &mut Buffer, pattern: &[u8]) -> Result<()> {
        let mut filled = pattern.len().min(to.len());
        self.write(to, &pattern[..filled])?;
        let _bound = self.device.bind()?;
        while filled > 0 && filled < to.len() {
            // Before the last round, the filled bytes are a whole number of patterns.
            let more = filled.min(to.len() - filled);
            // SAFETY: both ranges are within the buffer and do not overlap.
            unsafe { copy_on_device(&self.device, &self.stream, to.address() + filled as u64, to.address(), more) }?;
            filled += more;
        }
        self.wait()
    }

    /// Queues a copy between buffers, of as many bytes as the shorter one has.
    pub fn copy(&self, to: &mut Buffer, from: &Buffer) -> Result<()> {
        let _bound = self.device.bind()?;
        let bytes = to.len().min(from.len());
        to.wait_on_drop();
        from.wait_on_drop();
        // SAFETY: both have that many bytes, and their drop waits for the device.
        unsafe { copy_on_device(&self.device, &self.stream, to.address(), from.address(), bytes) }
    }

    /// Copies as many bytes as the shorter side has from pinned memory, waits, and returns the seconds on the device's
    /// clock.
    pub fn upload(&self, to: &mut Buffer, from: &PinnedMemory) -> Result<f64> {
        let _bound = self.device.bind()?;
        let bytes = to.len().min(from.0.len());
        // SAFETY: both have that many bytes, and the source is borrowed until the copies have run.
        let mut copy = || unsafe { copy_to_device(&self.device, &self.stream, to.address(), &from.0, 0, bytes) };
        self.wait_after(self.seconds(&mut copy))
    }

    /// Copies to pinned memory, as [`TimedStream::upload`] copies from it.
    pub fn download(&self, to: &mut PinnedMemory, from: &Buffer) -> Result<f64> {
        let _bound = self.device.bind()?;
        let bytes = to.0.len().min(from.len());
        // SAFETY: both have that many bytes, and the destination is borrowed until the copies have run.
        let mut copy = || unsafe { copy_to_host(&self.device, &self.stream, &to.0, 0, from.address(), bytes) };
        self.wait_after(self.seconds(&mut copy))
    }

    /// Waits for all work, even after an error, because the borrow of host memory ends.
    fn wait_after<T>(&self, outcome: Result<T>) -> Result<T> {
        let finished = self.wait();
        outcome.and_then(|value| finished.map(|()| value))
    }

    /// Copies bytes from pageable host memory by the driver's own staging, and waits.
    pub fn write(&self, to: &mut Buffer, bytes: &[u8]) -> Result<()> {
        let _bound = self.device.bind()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let address = within(to, &(0..bytes.len()));
        // SAFETY: `within` checks the size, and the source is borrowed until the copy has run.
        let queued = unsafe { result::memcpy_htod_async(address, bytes, self.stream.cu_stream()) };
        self.wait_after(queued.map_err(self.device.driver_error("copy to the device")))
    }

    /// Copies the beginning of a buffer to pageable host memory by the driver's own staging, and waits.
    pub fn read(&self, bytes: &mut [u8], from: &Buffer) -> Result<()> {
        let address = within(from, &(0..bytes.len()));
        // SAFETY: `within` checks the size.
        unsafe { self.fetch(bytes, address) }
    }

    /// Returns the bytes of part of a buffer.
    pub fn read_range(&self, from: &Buffer, range: Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; range.len()];
        // SAFETY: `within` checks the range, which has as many bytes.
        unsafe { self.fetch(&mut bytes, within(from, &range)) }?;
        Ok(bytes)
    }

    /// Copies bytes to the host and waits.
    ///
    /// # Safety
    /// `address` points to as many bytes of the device's memory.
    unsafe fn fetch(&self, bytes: &mut [u8], address: u64) -> Result<()> {
        let _bound = self.device.bind()?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller guarantees the source, and the destination is borrowed until the copy has run.
        let queued = unsafe { result::memcpy_dtoh_async(bytes, address, self.stream.cu_stream()) };
        self.wait_after(queued.map_err(self.device.driver_error("copy to the host")))
    }

    /// Returns elements of the averages of a profile after the newest update.
    pub fn averages(&self, averages: &DeviceAverages, profile: usize, elements: Range<usize>) -> Result<Averages> {
        averages.wait()?;
        let arenas = averages.arenas();
        let high = self.read_range(&arenas.high[profile], 4 * elements.start..4 * elements.end)?;
        let high = high.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let Some(low) = arenas.low.get(profile) else { return Ok(Averages { high, low: None }) };
        let low = self.read_range(low, 2 * elements.start..2 * elements.end)?;
        let low = low.as_chunks().0.iter().map(|bytes| i16::from_le_bytes(*bytes)).collect();
        Ok(Averages { high, low: Some(low) })
    }

    /// Resets averages to zeros, and waits.
    pub fn clear(&self, averages: &mut DeviceAverages) -> Result<()> {
        averages.wait()?;
        let arenas = averages.arenas();
        arenas.high.iter().chain(&arenas.low).try_for_each(|buffer| buffer.clear(&self.stream))?;
        self.wait()
    }

    /// Queues the launches of a blend, without the copies of [`super::Blender`].
    ///
    /// Each source and each result begins at the next multiple of 16 bytes in its buffer. `weights` holds those of
    /// target 0 for all sources, then those of target 1, and so on. The results have the dtype of the first source.
    ///
    /// # Panics
    /// Panics if a buffer is too small.
    pub fn blend(
        &self,
        results: &mut Buffer,
        sources: &Buffer,
        workspace: &mut BlendWorkspace,
        dtypes: &[Dtype],
        elements: usize,
        weights: &[f64],
    ) -> Result<()> {
        let _bound = self.device.bind()?;
        let part = BlendPart { sources: Vec::new(), dtypes: dtypes.to_vec(), output: dtypes[0], elements };
        let BlendWorkspace { overflows, sums } = workspace;
        [&*results, sources, overflows].into_iter().chain(sums.as_ref()).for_each(Buffer::wait_on_drop);
        let memory = ResidentBlend { inputs: sources, outputs: results, overflows, sums: sums.as_ref() };
        memory.queue(&self.device, &self.stream, part, weights)
    }

    /// Copies a buffer `times` times while an [`Offload`] copies tensors to the host, lent until its fence has passed.
    ///
    /// Returns the seconds of the first copies on the device's clock. The device is busy from the start.
    pub fn copy_beside(
        &self,
        to: &mut Buffer,
        from: &Buffer,
        times: usize,
        offload: &mut Offload,
        tensors: &[CudaMemory<'_>],
    ) -> Result<f64> {
        // SAFETY: they are borrowed for reading until the copy has arrived, which is waited for below.
        let lent: Vec<CudaMemory<'_>> = tensors.iter().map(|&memory| unsafe { memory.until_fence() }).collect();
        // Work that keeps the device busy while the host queues the rest.
        (0..8).try_for_each(|_| self.copy(to, from))?;
        self.mark(&self.begin)?;
        let (pending, _) = offload.copy(&lent)?;
        let outcome = (0..times).try_for_each(|_| self.copy(to, from)).and_then(|()| self.stop());
        pending.wait().and(outcome)
    }
}

/// Returns the address of part of a buffer.
fn within(buffer: &Buffer, range: &Range<usize>) -> u64 {
    assert!(range.start <= range.end && range.end <= buffer.len(), "{range:?} of {} bytes", buffer.len());
    buffer.address() + range.start as u64
}
