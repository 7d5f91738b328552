//! Work on a device that is done to see how long it takes: on a stream of its own, by the device's own clock, on memory
//! that is filled with known values.
//!
//! Whatever is written is borrowed for writing, all work on one stream is in order, and what uses the host's memory or
//! another stream is waited for. So no call here can be made at a wrong time.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{result, sys};
use half::bf16;
use safetensors::Dtype;

use super::blender::{Resident, Stretch};
use super::device::{Event, Stream};
use super::kernels::{SOURCES, TARGETS};
use super::memory::{copy_in, copy_out, copy_within};
use super::{Buffer, Device, DeviceAverages, Offload, Pinned};
use crate::compute::cpu::Averages;
use crate::error::{Error, Result};
use crate::tensor::CudaMemory;

/// The version of CUDA whose drivers have the call that reads the device's clock: 12.8.
const CLOCK: i32 = 12080;

/// A stream for timed work.
#[derive(Debug)]
pub struct TimedStream {
    device: Arc<Device>,
    stream: Stream,
    begin: Event,
    end: Event,
}

/// Pinned memory that no copy is using.
#[derive(Debug)]
pub struct Locked(Pinned);

impl Locked {
    /// Allocates zeroed memory.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the system does not lock so much.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Locked> {
        Pinned::new(device, bytes).map(Locked)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: only a trial copies to or from it, and waits.
        unsafe { self.0.bytes() }
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed for the caller alone.
        unsafe { self.0.bytes_mut() }
    }
}

/// What a blend on a device needs beside sources and results.
#[derive(Debug)]
pub struct Sums {
    unfit: Buffer,
    sums: Option<Buffer>,
}

impl Sums {
    /// The bytes that it takes on the device, for so many sources, targets and elements.
    pub fn bytes(sources: usize, targets: usize, elements: usize) -> usize {
        let sums = if sources > SOURCES { 8 * TARGETS.min(targets) * elements.next_multiple_of(4) } else { 0 };
        8 * targets + sums
    }

    /// Allocates it.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the device has too little memory.
    pub fn new(device: &Arc<Device>, sources: usize, targets: usize, elements: usize) -> Result<Sums> {
        let unfit = Buffer::new(device, 8 * targets, "the marks of a blend")?;
        let bytes = Sums::bytes(sources, targets, elements) - unfit.len();
        let sums = (bytes > 0).then(|| Buffer::new(device, bytes, "the sums of a blend")).transpose()?;
        Ok(Sums { unfit, sums })
    }
}

impl TimedStream {
    /// A stream of its own on a device.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the driver refuses, or is too old to tell the time.
    pub fn new(device: &Arc<Device>) -> Result<TimedStream> {
        let mut version = 0;
        // SAFETY: the device is open, so the driver is there; the pointer is valid for the call.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }
            .result()
            .map_err(device.driver_error("ask for its version"))?;
        if version < CLOCK {
            let reason = "its driver is older than CUDA 12.8: update the NVIDIA driver".into();
            return Err(Error::Cuda { device: device.number(), action: "read the device's clock".into(), reason });
        }
        let (begin, end) = (device.event()?, device.event()?);
        Ok(TimedStream { device: device.clone(), stream: device.stream()?, begin, end })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The seconds that the device takes for what `work` queues on this stream.
    ///
    /// It is queued twice, and the second round is timed: while the device does the first, the host queues the second, so
    /// that the host's own time is not counted.
    ///
    /// # Errors
    /// What `work` returns, and [`Error::Cuda`], as of all methods, where the device fails.
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

    /// The seconds from `begin` until all that is queued has run.
    fn stop(&self) -> Result<f64> {
        self.mark(&self.end)?;
        let _bound = self.device.bind()?;
        let milliseconds = self.begin.elapsed_ms(&self.end).map_err(self.device.driver_error("time its work"))?;
        // The clock has steps of half a microsecond; no work takes no time.
        Ok((f64::from(milliseconds) / 1e3).max(1e-7))
    }

    /// Waits until all that is queued has run.
    ///
    /// # Errors
    /// [`Error::Cuda`] where some of it failed.
    pub fn wait(&self) -> Result<()> {
        let _bound = self.device.bind()?;
        self.stream.synchronize().map_err(self.device.driver_error("finish its work"))
    }

    /// Lends a part of a buffer for reading, in the order of this stream.
    pub fn lend<'a>(&'a self, buffer: &'a Buffer, range: Range<usize>) -> CudaMemory<'a> {
        let stream = self.stream.cu_stream().addr();
        let address = within(buffer, &range);
        // SAFETY: the part lies in the buffer, which lives for `'a`, as the stream does; freeing it waits for the device.
        // Nobody writes a buffer that is borrowed for reading.
        unsafe { CudaMemory::from_raw(self.device.number(), stream, address, range.len()) }
    }

    /// Sets all bytes to `0xff`: NaN, whether f16, bf16 or f32.
    pub fn poison(&self, buffer: &mut Buffer) -> Result<()> {
        let _bound = self.device.bind()?;
        // SAFETY: the memory is that long, and ours to write in the stream's order.
        unsafe { result::memset_d8_async(buffer.address(), 0xff, buffer.len(), self.stream.cu_stream()) }
            .map_err(self.device.driver_error("set memory"))
    }

    /// Fills a buffer with repetitions of a pattern; the host waits.
    pub fn repeat(&self, to: &mut Buffer, pattern: &[u8]) -> Result<()> {
        let mut filled = pattern.len().min(to.len());
        self.write(to, &pattern[..filled])?;
        let _bound = self.device.bind()?;
        while filled > 0 && filled < to.len() {
            // Until the last round, what is filled is a whole number of patterns.
            let more = filled.min(to.len() - filled);
            // SAFETY: both parts lie in the buffer, one behind the other.
            unsafe { copy_within(&self.device, &self.stream, to.address() + filled as u64, to.address(), more) }?;
            filled += more;
        }
        self.wait()
    }

    /// Queues a copy from one buffer to another, of as many bytes as the shorter one has.
    pub fn copy(&self, to: &mut Buffer, from: &Buffer) -> Result<()> {
        let _bound = self.device.bind()?;
        let bytes = to.len().min(from.len());
        // SAFETY: both are that long, and freeing them waits for the device.
        unsafe { copy_within(&self.device, &self.stream, to.address(), from.address(), bytes) }
    }

    /// Copies from pinned memory, as many bytes as the shorter side has, and returns the seconds on the device's clock.
    pub fn upload(&self, to: &mut Buffer, from: &Locked) -> Result<f64> {
        let _bound = self.device.bind()?;
        let bytes = to.len().min(from.0.len());
        // SAFETY: both are that long; the source is borrowed until the copies have run.
        let mut copy = || unsafe { copy_in(&self.device, &self.stream, to.address(), &from.0, 0, bytes) };
        self.waited(self.seconds(&mut copy))
    }

    /// Copies to pinned memory, as [`TimedStream::upload`] does from it.
    pub fn download(&self, to: &mut Locked, from: &Buffer) -> Result<f64> {
        let _bound = self.device.bind()?;
        let bytes = to.0.len().min(from.len());
        // SAFETY: both are that long; the destination is borrowed until the copies have run.
        let mut copy = || unsafe { copy_out(&self.device, &self.stream, &to.0, 0, from.address(), bytes) };
        self.waited(self.seconds(&mut copy))
    }

    /// Waits even after an error: the host's memory is given back to its owner.
    fn waited<T>(&self, outcome: Result<T>) -> Result<T> {
        let finished = self.wait();
        outcome.and_then(|value| finished.map(|()| value))
    }

    /// Copies from ordinary memory of the host, all of it, as the driver does it; the host waits.
    pub fn write(&self, to: &mut Buffer, bytes: &[u8]) -> Result<()> {
        let _bound = self.device.bind()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let address = within(to, &(0..bytes.len()));
        // SAFETY: the buffer is long enough, and the source is borrowed until the copy has run.
        let queued = unsafe { result::memcpy_htod_async(address, bytes, self.stream.cu_stream()) };
        self.waited(queued.map_err(self.device.driver_error("copy to the device")))
    }

    /// Copies the beginning of a buffer to ordinary memory of the host, as the driver does it; the host waits.
    pub fn read(&self, bytes: &mut [u8], from: &Buffer) -> Result<()> {
        let address = within(from, &(0..bytes.len()));
        // SAFETY: the buffer is long enough.
        unsafe { self.fetch(bytes, address) }
    }

    /// A part of a buffer; the host waits.
    pub fn part(&self, from: &Buffer, range: Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; range.len()];
        // SAFETY: the part is as long.
        unsafe { self.fetch(&mut bytes, within(from, &range)) }?;
        Ok(bytes)
    }

    /// Copies to the host and waits.
    ///
    /// # Safety
    /// From `address` on, as many bytes lie in memory of the device.
    unsafe fn fetch(&self, bytes: &mut [u8], address: u64) -> Result<()> {
        let _bound = self.device.bind()?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's promise; the destination is borrowed until the copy has run.
        let queued = unsafe { result::memcpy_dtoh_async(bytes, address, self.stream.cu_stream()) };
        self.waited(queued.map_err(self.device.driver_error("copy to the host")))
    }

    /// A stretch of an arena of averages, as the newest update leaves it; the host waits.
    pub fn averages(&self, of: &DeviceAverages, profile: usize, range: Range<usize>) -> Result<Averages> {
        of.wait()?;
        let arenas = of.arenas();
        let part = |buffer: &Buffer, size: usize| self.part(buffer, size * range.start..size * range.end);
        let word = |bytes: &[u8]| u16::from(bytes[0]) | u16::from(bytes[1]) << 8;
        let low = arenas.low.get(profile).map(|buffer| part(buffer, 2)).transpose()?;
        let low = low.map(|bytes| bytes.chunks_exact(2).map(|b| bf16::from_bits(word(b))).collect());
        let high = part(&arenas.high[profile], 4)?;
        let high = high.chunks_exact(4).map(|b| f32::from_bits(u32::from(word(b)) | u32::from(word(&b[2..])) << 16));
        Ok(Averages { high: high.collect(), low })
    }

    /// Sets averages back to zeros; the host waits.
    pub fn clear(&self, averages: &mut DeviceAverages) -> Result<()> {
        averages.wait()?;
        let arenas = averages.arenas();
        arenas.high.iter().chain(&arenas.low).try_for_each(|buffer| buffer.clear(&self.stream))?;
        self.wait()
    }

    /// Queues the blend of sources of one dtype, each at the next multiple of 16 bytes, into results that lie likewise:
    /// the launches of [`super::Blender`], without its copies. `weights` are those of target 0 for all sources, then those
    /// of target 1, and so on.
    ///
    /// # Panics
    /// Where a buffer is too small.
    pub fn blend(
        &self,
        results: &mut Buffer,
        sources: &Buffer,
        sums: &mut Sums,
        dtypes: &[Dtype],
        elements: usize,
        weights: &[f64],
    ) -> Result<()> {
        let _bound = self.device.bind()?;
        let stretch = Stretch { sources: Vec::new(), dtypes: dtypes.to_vec(), output: dtypes[0], elements };
        let memory = Resident { inputs: sources, outputs: results, unfit: &sums.unfit, sums: sums.sums.as_ref() };
        memory.blend(&self.device, &self.stream, stretch, weights)
    }

    /// Copies a buffer `times` times while an [`Offload`] takes tensors to the host, which are lent until its fence has
    /// passed, and returns the seconds that the copies take on the device's clock. Work is under way before.
    pub fn copy_beside(
        &self,
        to: &mut Buffer,
        from: &Buffer,
        times: usize,
        offload: &mut Offload,
        tensors: &[CudaMemory<'_>],
    ) -> Result<f64> {
        // SAFETY: nobody writes them before the copy has arrived, which is waited for below: they are lent for reading.
        let lent: Vec<CudaMemory<'_>> = tensors.iter().map(|&memory| unsafe { memory.until_fence() }).collect();
        // As long as it takes the host to queue the rest.
        (0..8).try_for_each(|_| self.copy(to, from))?;
        self.mark(&self.begin)?;
        let (staged, _) = offload.copy(&lent)?;
        let outcome = (0..times).try_for_each(|_| self.copy(to, from)).and_then(|()| self.stop());
        staged.wait().and(outcome)
    }
}

/// The address of a part of a buffer.
fn within(buffer: &Buffer, range: &Range<usize>) -> u64 {
    assert!(range.start <= range.end && range.end <= buffer.len(), "{range:?} of {} bytes", buffer.len());
    buffer.address() + range.start as u64
}
