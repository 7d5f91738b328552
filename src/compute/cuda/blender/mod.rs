//! Blends on a device with sources on the host.
//!
//! Parts of tensors are copied through pinned memory and blended. The results are copied back, or into memory of
//! another library on the device. Three slots take turns: the CPU fills one, the device works on another, and the
//! results of the third are delivered.

mod fill;
mod job;
mod on_host;
mod pieces;
mod queue;

use std::ops::Range;
use std::sync::Arc;

use safetensors::Dtype;

use super::device::{ContextGuard, Event, Stream};
use super::kernels::{MAX_SOURCES, MAX_TARGETS};
use super::{Buffer, CudaDevice, Pinned};
use crate::compute::cpu::Overflow;
use crate::error::{Error, Result};
use crate::tensor::{CudaMemory, CudaMemoryMut, ScatteredElements};

use job::{BlendJob, check_sizes};
use queue::JobQueue;
pub(super) use queue::ResidentBlend;

/// Elements of one source of a blend.
#[derive(Clone, Copy, Debug)]
pub enum BlendInput<'a> {
    /// Bytes in host memory, mapped files included.
    Host(&'a [u8]),
    /// Pieces of host memory.
    Scattered {
        /// Elements of the tensor.
        elements: &'a dyn ScatteredElements,
        /// Byte of the tensor that is the first.
        start: usize,
        /// Number of bytes.
        bytes: usize,
    },
    /// Memory of the blender's device, which no pending work writes.
    Device {
        /// Address on the device.
        address: u64,
        /// Number of bytes.
        bytes: usize,
    },
}

impl<'a> BlendInput<'a> {
    /// Returns a range of the bytes.
    pub fn slice(self, range: Range<usize>) -> BlendInput<'a> {
        match self {
            BlendInput::Host(bytes) => BlendInput::Host(&bytes[range]),
            BlendInput::Scattered { elements, start, bytes } => {
                assert!(range.start <= range.end && range.end <= bytes, "{range:?} of {bytes} bytes");
                BlendInput::Scattered { elements, start: start + range.start, bytes: range.len() }
            }
            BlendInput::Device { address, bytes } => {
                assert!(range.start <= range.end && range.end <= bytes, "{range:?} of {bytes} bytes");
                BlendInput::Device { address: address + range.start as u64, bytes: range.len() }
            }
        }
    }

    /// Returns the number of bytes.
    pub fn len(self) -> usize {
        match self {
            BlendInput::Host(bytes) => bytes.len(),
            BlendInput::Scattered { bytes, .. } | BlendInput::Device { bytes, .. } => bytes,
        }
    }

    /// Returns true if the input has no bytes.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Part of one tensor that is to be blended.
#[derive(Clone, Debug)]
pub struct BlendPart<'a> {
    /// Elements of each source.
    pub sources: Vec<BlendInput<'a>>,
    /// Dtype of each source.
    pub dtypes: Vec<Dtype>,
    /// Dtype of the results.
    pub output: Dtype,
    /// Number of elements of each source.
    pub elements: usize,
}

/// Callback that receives the results of each target: all parts, one after the other.
pub type Deliver<'a> = Box<dyn FnOnce(&[&[u8]]) -> Result<()> + 'a>;

/// Destination of a block's results.
pub enum Destination<'a, 'm> {
    /// Callback that is called later.
    Host(Deliver<'a>),
    /// Device memory for each part of the only target. All work is queued in the order of the memory's stream before
    /// [`Blender::submit`] returns.
    Device(Vec<CudaMemoryMut<'m>>),
}

/// Callback that returns the error for an overflow in the part of this index.
pub type OverflowHandler<'a> = Box<dyn FnOnce(usize, Overflow) -> Error + 'a>;

/// Number of blocks that are in work.
const SLOTS: usize = 3;

/// Blender of blocks of parts on one device.
pub struct Blender<'a> {
    device: Arc<CudaDevice>,
    /// From the oldest block to the newest.
    slots: [BlendSlot<'a>; SLOTS],
    /// Most elements of a piece, if the device has no memory for whole blocks.
    piece: Option<usize>,
    /// True if not even the smallest piece fits, so that the CPU blends.
    is_on_host: bool,
}

/// Pinned host memory and device memory of the same size.
struct MirroredBuffer {
    host: Pinned,
    device: Buffer,
}

/// Stream, buffers and pending job of one block.
struct BlendSlot<'a> {
    stream: Stream,
    /// Event that passes when the block is done.
    done: Event,
    inputs: Option<MirroredBuffer>,
    outputs: Option<MirroredBuffer>,
    /// Sums between launches, if there are more sources than one launch takes.
    sums: Option<Buffer>,
    /// First overflowing element of each group and target.
    overflows: Option<MirroredBuffer>,
    job: Option<BlendJob<'a>>,
}

impl<'a> Blender<'a> {
    /// Creates a blender on a device.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the driver fails.
    pub fn new(device: &Arc<CudaDevice>) -> Result<Blender<'a>> {
        let slots = [BlendSlot::new(device)?, BlendSlot::new(device)?, BlendSlot::new(device)?];
        Ok(Blender { device: device.clone(), slots, piece: None, is_on_host: false })
    }

    /// Returns the device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Queues the blend of a block of parts into `targets` targets. An earlier block may be awaited and delivered
    /// before it returns.
    ///
    /// `weights` holds those of target 0 for all sources, then those of target 1, and so on. A block for which the
    /// device has too little memory is blended in smaller pieces, and on the CPU if not even those fit.
    ///
    /// # Errors
    /// The error of an earlier block's delivery or overflow handler, or [`Error::Cuda`].
    pub fn submit(
        &mut self,
        parts: Vec<BlendPart<'a>>,
        weights: &'a [f64],
        targets: usize,
        destination: Destination<'a, '_>,
        on_overflow: OverflowHandler<'a>,
    ) -> Result<()> {
        let device = self.device.clone();
        check_sizes(&device, &parts, weights, targets, &destination)?;
        let _bound = device.bind()?;
        let (deliver, to) = match destination {
            Destination::Host(deliver) => (Some(deliver), Vec::new()),
            Destination::Device(to) => (None, to.into_iter().map(|memory| memory.0).collect()),
        };
        let job = BlendJob::new(parts, weights, targets, deliver, on_overflow);
        if self.piece.is_some() {
            return self.blend_in_pieces(job, &to);
        }
        self.slots.rotate_left(1);
        let [oldest, _, slot] = &mut self.slots;
        slot.finish(&device)?;
        match slot.prepare(&device, &job) {
            Ok(()) => {
                slot.fill(&job, || oldest.finish(&device))?;
                slot.queue(&device, job, &to)
            }
            Err(Error::DeviceMemory { reason, .. }) => {
                self.flush()?;
                self.warn_of_pieces(&job, &reason);
                self.blend_in_pieces(job, &to)
            }
            Err(error) => Err(error),
        }
    }

    /// Waits for all blocks and delivers them.
    ///
    /// # Errors
    /// As [`Blender::submit`]. Blocks after the first that fails are not delivered.
    pub fn flush(&mut self) -> Result<()> {
        let device = self.device.clone();
        let _bound = device.bind()?;
        self.slots.iter_mut().try_for_each(|slot| slot.finish(&device))
    }
}

impl Drop for BlendSlot<'_> {
    fn drop(&mut self) {
        // The buffers must not be freed during a copy. An error here was already reported.
        let _bound = ContextGuard::new();
        let _ = self.stream.synchronize();
    }
}

/// Returns the buffer that `prepare` has allocated.
fn allocated(buffer: &mut Option<MirroredBuffer>) -> Result<&mut MirroredBuffer> {
    buffer.as_mut().ok_or_else(|| Error::Internal("the blend has no buffers".into()))
}

impl<'a> BlendSlot<'a> {
    fn new(device: &CudaDevice) -> Result<BlendSlot<'a>> {
        Ok(BlendSlot {
            stream: device.stream()?,
            done: device.event()?,
            inputs: None,
            outputs: None,
            sums: None,
            overflows: None,
            job: None,
        })
    }

    /// Allocates buffers that are large enough for a job.
    fn prepare(&mut self, device: &Arc<CudaDevice>, job: &BlendJob<'_>) -> Result<()> {
        let outputs = job.groups.last().map_or(0, |group| group.outputs + group.pitch * job.targets);
        grow(&mut self.inputs, device, job.input_bytes())?;
        grow(&mut self.outputs, device, outputs.max(job.packed * job.targets))?;
        grow(&mut self.overflows, device, 8 * job.groups.len() * job.targets)?;
        let most = job.groups.iter().map(|group| group.elements).max().unwrap_or(0);
        let sums = 8 * MAX_TARGETS.min(job.targets) * most.next_multiple_of(4);
        let needs_sums = job.parts.iter().any(|part| part.sources.len() > MAX_SOURCES);
        if needs_sums && self.sums.as_ref().is_none_or(|buffer| buffer.len() < sums) {
            self.sums = None;
            self.sums = Some(Buffer::new(device, sums, "the sums of a blend")?);
        }
        Ok(())
    }

    /// Copies the inputs of a job from the host into pinned memory. An older block is delivered meanwhile.
    fn fill(&mut self, job: &BlendJob<'_>, deliver_older: impl FnOnce() -> Result<()>) -> Result<()> {
        let (groups, parts) = (&job.groups, &job.parts);
        // SAFETY: the slot's earlier block is finished, so no pending work uses the buffer.
        let to = unsafe { allocated(&mut self.inputs)?.host.bytes_mut() };
        if job.input_bytes() < fill::PIECE {
            // Another thread would take longer to wake up.
            deliver_older()?;
            fill::fill(groups, parts, to);
            return Ok(());
        }
        rayon::in_place_scope(|scope| {
            scope.spawn(move |_| fill::fill(groups, parts, to));
            deliver_older()
        })
    }

    /// Queues a job whose inputs were filled in. Its results are copied to `to` if they stay on the device.
    fn queue(&mut self, device: &CudaDevice, job: BlendJob<'a>, to: &[CudaMemory<'_>]) -> Result<()> {
        let owner = to.first().map(|memory| device.borrow_stream(memory.stream)).transpose()?;
        // From here on the slot has pending work. It is awaited even if the rest cannot be queued.
        let job = self.job.insert(job);
        let queue = JobQueue { device, stream: &self.stream, job };
        let inputs = allocated(&mut self.inputs)?;
        let outputs = allocated(&mut self.outputs)?;
        let overflows = allocated(&mut self.overflows)?;
        queue.send(inputs)?;
        queue.clear(overflows)?;
        queue.blend(&inputs.device, &outputs.device, &overflows.device, self.sums.as_ref())?;
        queue.fetch(overflows, outputs)?;
        queue.deliver_on_device(&outputs.device, to, owner.as_deref(), &self.done)
    }

    /// Frees all buffers, which have no pending work.
    fn release(&mut self) {
        self.inputs = None;
        self.outputs = None;
        self.sums = None;
        self.overflows = None;
    }

    /// Waits for the slot's block and delivers it.
    fn finish(&mut self, device: &CudaDevice) -> Result<()> {
        let Some(job) = self.job.take() else { return Ok(()) };
        device.wait_for(&self.stream, "blend")?;
        // SAFETY: the stream has no pending work.
        let words = unsafe { allocated(&mut self.overflows)?.host.bytes() };
        let words = words[..8 * job.groups.len() * job.targets].as_chunks::<8>().0;
        if let Some(found) = words.iter().position(|word| *word != [0xff; 8]) {
            let inputs = allocated(&mut self.inputs)?;
            let element = u64::from_le_bytes(words[found]) as usize;
            let group = found / job.targets;
            let target = found % job.targets;
            let (part, overflow) = job.locate(device, &self.stream, &inputs.device, group, target, element)?;
            return Err((job.on_overflow)(part, overflow));
        }
        let Some(deliver) = job.deliver else { return Ok(()) };
        // SAFETY: as above.
        let bytes = unsafe { allocated(&mut self.outputs)?.host.bytes() };
        let results: Vec<&[u8]> = (0..job.targets).map(|target| &bytes[target * job.packed..][..job.packed]).collect();
        deliver(&results)
    }
}

/// Grows a buffer to at least `bytes` bytes. The old memory has no pending work and is freed first.
fn grow(buffer: &mut Option<MirroredBuffer>, device: &Arc<CudaDevice>, bytes: usize) -> Result<()> {
    if buffer.as_ref().is_none_or(|buffer| buffer.host.len() < bytes) {
        // Rounded up, so that slightly larger blocks do not allocate again.
        let bytes = bytes.next_power_of_two();
        *buffer = None;
        let host = Pinned::new(device, bytes)?;
        *buffer = Some(MirroredBuffer { host, device: Buffer::new(device, bytes, "a block of snapshots")? });
    }
    Ok(())
}
