//! The bus between host and device: its limits, and parameters offloaded to averages on the host.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use posthoc_ema::compute::cuda::{Buffer, CudaDevice, Offload, PinnedMemory, TimedStream};
use posthoc_ema::{CudaMemory, Error, Result};
use safetensors::Dtype;

use super::super::Work;
use super::super::cases::{PERIOD, Sizes, name, parameter, plural, split};
use super::super::machine::free_memory;
use super::super::session::{Session, Task, TaskInfo, timed};
use super::copy::{CopyMemory, DeviceCopy, check_copy, check_pattern};

/// Name of the limit of work beside the bus.
const COPY: &str = "copy within the device, beside the bus";
/// Name of the limit of copies to the device.
const TO_DEVICE: &str = "pinned host to device";
/// Name of the limit of offloads.
const TO_HOST: &str = "device to host, pinned";

/// Most parameters that are copied: a gigabyte of f32 is enough for any bus.
const MAX_PARAMETERS: usize = 1 << 28;

/// Host memory of a parameter in bytes.
///
/// The offload has two pinned copies each in f32 and bf16. The limits have 4 bytes each of pinned and pageable memory.
const HOST_BYTES: usize = 2 * (4 + 2) + 4 + 4;

/// Repetitions of the parameters that the host writes. The device makes the others.
const REPETITIONS: usize = 1 << 12;

/// Most copies beside an offload, in case a clock is wrong.
const MAX_COPIES: usize = 1000;

/// Alignment of tensors in bytes, as in frameworks.
const ALIGNMENT: usize = 256;

/// Times all cases.
pub(super) fn measure(device: &Arc<CudaDevice>, sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
    let parameters = parameters(sizes);
    let elements = split(parameters, sizes.tensors.min(parameters));
    let f32s = OffloadTask::new(Dtype::F32, &elements);
    let bf16s = OffloadTask::new(Dtype::BF16, &elements);
    let beside = OffloadTask::new(Dtype::F32, &elements);
    let mut state = BusMemory::new(device, &[&f32s, &bf16s])?;
    let tasks: Vec<Box<dyn Task<BusMemory>>> = vec![
        Box::new(DeviceCopy { name: COPY, bytes: state.parameters.len() }),
        Box::new(BusLimit::PinnedToDevice(state.parameters.len())),
        Box::new(BusLimit::PinnedToHost(state.parameters.len())),
        Box::new(BusLimit::PageableToDevice(state.parameters.len())),
        Box::new(BusLimit::PageableToHost(state.parameters.len())),
        Box::new(f32s),
        Box::new(bf16s),
        Box::new(CopyDuringOffload { offload: beside, bytes: state.parameters.len(), times: Cell::new(1) }),
    ];
    session.measure("bus", &mut state, &tasks)
}

/// Returns the device memory in bytes.
pub(super) fn bytes(sizes: &Sizes) -> u128 {
    // Each small tensor has an entry in a table, which has the same length in both dtypes.
    let each = size_of::<f32>() * sizes.parameters.min(MAX_PARAMETERS) + 2 * ALIGNMENT * sizes.tensors;
    2 * each as u128
}

/// Parameters on the device, and memory on both sides of the bus.
struct BusMemory {
    stream: TimedStream,
    parameters: Buffer,
    /// Destination of copies on the device.
    copy: Buffer,
    pinned: PinnedMemory,
    pageable: Vec<u8>,
    pattern: Vec<u8>,
    offloads: Vec<(Dtype, Offload)>,
}

impl BusMemory {
    fn new(device: &Arc<CudaDevice>, tasks: &[&OffloadTask]) -> Result<BusMemory> {
        let bytes = tasks.iter().filter_map(|task| task.places.last()).map(|place| place.end).max().unwrap_or(1);
        let buffer = || Buffer::new(device, bytes, "parameters");
        let stream = TimedStream::new(device)?;
        let mut parameters = buffer()?;
        let copy = buffer()?;
        let pattern: Vec<u8> = (0..PERIOD * REPETITIONS).map(parameter).flat_map(f32::to_le_bytes).collect();
        stream.repeat(&mut parameters, &pattern)?;
        let mut offloads = Vec::new();
        for task in tasks {
            let sizes: Vec<usize> = task.places.iter().map(Range::len).collect();
            offloads.push((task.dtype, Offload::new(device, &sizes, false)?));
        }
        let pinned = PinnedMemory::new(device, bytes)?;
        let pageable = vec![0; bytes];
        Ok(BusMemory { stream, parameters, copy, pinned, pageable, pattern, offloads })
    }

    /// Returns the inputs of an offload of the parameters in a dtype.
    fn offload(&mut self, dtype: Dtype) -> Result<OffloadInputs<'_>> {
        let found = self.offloads.iter_mut().find(|(of, _)| *of == dtype);
        let missing = || Error::Internal(format!("no offload was made for {dtype}"));
        let (_, offload) = found.ok_or_else(missing)?;
        let BusMemory { stream, parameters, copy, pattern, .. } = self;
        Ok(OffloadInputs { stream, parameters, copy, pattern, offload })
    }
}

/// Inputs of an offload.
struct OffloadInputs<'s> {
    stream: &'s TimedStream,
    parameters: &'s Buffer,
    copy: &'s mut Buffer,
    pattern: &'s [u8],
    offload: &'s mut Offload,
}

impl CopyMemory for BusMemory {
    fn copy_buffers(&mut self) -> (&TimedStream, &mut Buffer, &Buffer) {
        (&self.stream, &mut self.copy, &self.parameters)
    }

    fn pattern(&self) -> &[u8] {
        &self.pattern
    }
}

/// A limit of the bus in one direction, with its number of bytes.
#[derive(Clone, Copy, Debug)]
enum BusLimit {
    PinnedToDevice(usize),
    PinnedToHost(usize),
    PageableToDevice(usize),
    PageableToHost(usize),
}

impl BusLimit {
    fn name(self) -> (&'static str, usize) {
        match self {
            BusLimit::PinnedToDevice(bytes) => (TO_DEVICE, bytes),
            BusLimit::PinnedToHost(bytes) => (TO_HOST, bytes),
            BusLimit::PageableToDevice(bytes) => ("pageable host to device", bytes),
            BusLimit::PageableToHost(bytes) => ("pageable device to host", bytes),
        }
    }
}

/// Fills bytes with repetitions of a pattern.
fn fill(bytes: &mut [u8], pattern: &[u8]) {
    for chunk in bytes.chunks_mut(pattern.len()) {
        chunk.copy_from_slice(&pattern[..chunk.len()]);
    }
}

impl Task<BusMemory> for BusLimit {
    fn info(&self) -> TaskInfo {
        let (name, bytes) = self.name();
        TaskInfo::limit(name, bytes)
    }

    fn check(&self, state: &mut BusMemory) -> Result<()> {
        let (name, bytes) = self.name();
        let BusMemory { stream, copy, pinned, pageable, pattern, .. } = state;
        let to_device = matches!(self, BusLimit::PinnedToDevice(_) | BusLimit::PageableToDevice(_));
        for host in [pinned.bytes_mut(), pageable] {
            if to_device {
                fill(&mut host[..bytes], pattern);
            } else {
                host.fill(0xff);
            }
        }
        stream.poison(copy)?;
        self.seconds(state)?;
        match self {
            BusLimit::PinnedToHost(_) => check_pattern(state.pinned.bytes(), &state.pattern, 0, name),
            BusLimit::PageableToHost(_) => check_pattern(&state.pageable, &state.pattern, 0, name),
            _ => check_copy(state, name, bytes),
        }
    }

    fn seconds(&self, state: &mut BusMemory) -> Result<f64> {
        let BusMemory { stream, parameters, copy, pinned, pageable, .. } = state;
        let mut copied = Ok(());
        let seconds = match self {
            BusLimit::PinnedToDevice(_) => stream.upload(copy, pinned)?,
            BusLimit::PinnedToHost(_) => stream.download(pinned, parameters)?,
            BusLimit::PageableToDevice(_) => timed(|| copied = stream.write(copy, pageable)),
            BusLimit::PageableToHost(_) => timed(|| copied = stream.read(pageable, parameters)),
        };
        copied.map(|()| seconds)
    }
}

/// Copies parameters of a dtype to the host, until they can be folded into averages.
struct OffloadTask {
    dtype: Dtype,
    /// Byte range of each tensor in the parameters.
    places: Vec<Range<usize>>,
}

impl OffloadTask {
    fn new(dtype: Dtype, elements: &[usize]) -> OffloadTask {
        let mut places = Vec::new();
        let mut start = 0;
        for n in elements {
            let bytes = n * dtype.bitsize() / 8;
            places.push(start..start + bytes);
            start += bytes.next_multiple_of(ALIGNMENT);
        }
        OffloadTask { dtype, places }
    }

    fn name(&self) -> String {
        let tensors = self.places.len();
        format!("{} parameters in {tensors} tensor{} to the host", name(self.dtype), plural(tensors))
    }

    fn tensors<'s>(&self, stream: &'s TimedStream, parameters: &'s Buffer) -> Vec<CudaMemory<'s>> {
        self.places.iter().map(|place| stream.lend(parameters, place.clone())).collect()
    }
}

impl Task<BusMemory> for OffloadTask {
    fn info(&self) -> TaskInfo {
        let bytes = self.places.iter().map(Range::len).sum::<usize>() as u64;
        TaskInfo { name: self.name(), work: Work::Offload, bytes, limit: Some(TO_HOST.into()) }
    }

    fn check(&self, state: &mut BusMemory) -> Result<()> {
        let OffloadInputs { stream, parameters, pattern, offload, .. } = state.offload(self.dtype)?;
        let (pending, _) = offload.copy(&self.tensors(stream, parameters))?;
        let copied = pending.wait()?;
        for (i, place) in self.places.iter().enumerate() {
            check_pattern(copied.tensor(i), pattern, place.start, &self.name())?;
        }
        Ok(())
    }

    fn seconds(&self, state: &mut BusMemory) -> Result<f64> {
        let OffloadInputs { stream, parameters, offload, .. } = state.offload(self.dtype)?;
        let tensors = self.tensors(stream, parameters);
        let mut copied = Ok(());
        let seconds = timed(|| copied = offload.copy(&tensors).and_then(|(pending, _)| pending.wait()).map(drop));
        copied.map(|()| seconds)
    }
}

/// Copies within the device during an offload, to measure what the training stream loses to it.
///
/// The copies want all of the device's memory bandwidth. They are queued behind the start of an offload and last as
/// long as it.
struct CopyDuringOffload {
    offload: OffloadTask,
    bytes: usize,
    /// Number of copies that last as long as the offload.
    times: Cell<usize>,
}

impl Task<BusMemory> for CopyDuringOffload {
    fn info(&self) -> TaskInfo {
        let name = format!("copies within the device, while {} go", self.offload.name());
        let bytes = (2 * self.bytes * self.times.get()) as u64;
        TaskInfo { name, work: Work::Offload, bytes, limit: Some(COPY.into()) }
    }

    fn check(&self, state: &mut BusMemory) -> Result<()> {
        let offload_seconds = self.offload.seconds(state)?;
        let (stream, to, from) = state.copy_buffers();
        let copy_seconds = stream.seconds(&mut || stream.copy(to, from))?;
        self.times.set(((offload_seconds / copy_seconds).ceil() as usize).clamp(1, MAX_COPIES));
        stream.poison(to)?;
        self.seconds(state)?;
        check_copy(state, COPY, self.bytes)
    }

    fn seconds(&self, state: &mut BusMemory) -> Result<f64> {
        let OffloadInputs { stream, parameters, copy, offload, .. } = state.offload(self.offload.dtype)?;
        let tensors = self.offload.tensors(stream, parameters);
        stream.copy_beside(copy, parameters, self.times.get(), offload, &tensors)
    }
}

/// Returns the number of copied parameters: at most [`MAX_PARAMETERS`], and a quarter of the host's free memory.
fn parameters(sizes: &Sizes) -> usize {
    let free = free_memory().map_or(usize::MAX, |bytes| bytes as usize);
    sizes.parameters.min(MAX_PARAMETERS).min(free / 4 / HOST_BYTES).max(1)
}
