//! Blending on a device what lies on the host: stretches of tensors travel through pinned memory, are blended, and the
//! results travel back or into somebody's memory on the device. Two slots take turns, so that one is filled by the CPU
//! while the other is on the bus or being blended.

mod job;
mod queue;

use std::ops::Range;
use std::sync::Arc;

use safetensors::Dtype;

use super::Device;
use super::device::{ContextGuard, Event, Stream};
use super::kernels::{SOURCES, TARGETS};
use super::memory::{Buffer, Pinned};
use crate::compute::cpu::Overflow;
use crate::error::{Error, Result};
use crate::tensor::CudaMemoryMut;

use job::{Job, check, group};
use queue::Queue;
pub(super) use queue::Resident;

/// The elements of a source's stretch.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// In host memory, mapped files included.
    Host(&'a [u8]),
    /// In memory of the blender's own device, with no work under way that writes it.
    Device {
        /// Where they begin.
        address: u64,
        /// How many bytes there are.
        bytes: usize,
    },
}

impl<'a> Input<'a> {
    /// A part of it.
    pub fn slice(self, range: Range<usize>) -> Input<'a> {
        match self {
            Input::Host(bytes) => Input::Host(&bytes[range]),
            Input::Device { address, bytes } => {
                assert!(range.start <= range.end && range.end <= bytes, "{range:?} of {bytes} bytes");
                Input::Device { address: address + range.start as u64, bytes: range.len() }
            }
        }
    }

    /// The number of bytes.
    pub fn len(self) -> usize {
        match self {
            Input::Host(bytes) => bytes.len(),
            Input::Device { bytes, .. } => bytes,
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// A stretch of one tensor that is to be blended.
#[derive(Clone, Debug)]
pub struct Stretch<'a> {
    /// Of every source, the same number of elements.
    pub sources: Vec<Input<'a>>,
    /// The dtype of every source.
    pub dtypes: Vec<Dtype>,
    /// The dtype of the results.
    pub output: Dtype,
    /// How many elements there are.
    pub elements: usize,
}

/// Called with the results of each target: all stretches, one after the other.
pub type Deliver<'a> = Box<dyn FnOnce(&[&[u8]]) -> Result<()> + 'a>;

/// Where the results of a block go.
pub enum Delivery<'a, 'm> {
    /// To this function, later.
    Host(Deliver<'a>),
    /// The results of the only target, stretch by stretch, in the order of the memory's stream: all is queued there
    /// before the block's submission returns.
    Device(Vec<CudaMemoryMut<'m>>),
}

/// Called with a stretch's index and the element that does not fit: makes the error.
pub type Report<'a> = Box<dyn FnOnce(usize, Overflow) -> Error + 'a>;

/// Blends blocks of stretches on one device.
pub struct Blender<'a> {
    device: Arc<Device>,
    slots: [Slot<'a>; 2],
    next: usize,
}

/// The buffers of one block and the stream on which it is worked on.
struct Slot<'a> {
    stream: Stream,
    /// Passes when the block is done.
    done: Event,
    inputs: Option<(Pinned, Buffer)>,
    outputs: Option<(Pinned, Buffer)>,
    /// Sums between launches, where there are more sources than one takes.
    sums: Option<Buffer>,
    /// The first unfit element of each group and target.
    unfit: Option<(Pinned, Buffer)>,
    job: Option<Job<'a>>,
}

impl<'a> Blender<'a> {
    /// Prepares to blend on a device.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the driver refuses.
    pub fn new(device: &Arc<Device>) -> Result<Blender<'a>> {
        let slot = || -> Result<Slot<'a>> {
            let (stream, done) = (device.stream()?, device.event()?);
            Ok(Slot { stream, done, inputs: None, outputs: None, sums: None, unfit: None, job: None })
        };
        Ok(Blender { device: device.clone(), slots: [slot()?, slot()?], next: 0 })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Queues the blend of some stretches into `targets` targets; `weights` are those of target 0 for all sources, then
    /// those of target 1, and so on. Before it returns, an earlier block may be waited for and delivered.
    ///
    /// # Errors
    /// What the delivery of an earlier block returned, the report of a sum that its dtype cannot hold, or [`Error::Cuda`].
    pub fn submit(
        &mut self,
        stretches: Vec<Stretch<'a>>,
        weights: &'a [f64],
        targets: usize,
        delivery: Delivery<'a, '_>,
        report: Report<'a>,
    ) -> Result<()> {
        let device = self.device.clone();
        check(&device, &stretches, weights, targets, &delivery)?;
        let _bound = device.bind()?;
        let slot = &mut self.slots[self.next % 2];
        self.next += 1;
        slot.finish(&device)?;
        let groups = group(&stretches, targets);
        let packed = groups.last().map_or(0, |group| group.before + group.bytes);
        let (deliver, to) = match delivery {
            Delivery::Host(deliver) => (Some(deliver), Vec::new()),
            Delivery::Device(to) => (None, to.into_iter().map(|memory| memory.0).collect()),
        };
        let job = Job { groups, stretches, weights, targets, deliver, report, packed };
        slot.prepare(&device, &job)?;
        // From here on the slot has work under way: it is waited for even where the rest cannot be queued.
        let job = slot.job.insert(job);
        let queue = Queue { device: &device, stream: &slot.stream, job };
        let (inputs, outputs, unfit) = (pair(&mut slot.inputs)?, pair(&mut slot.outputs)?, pair(&mut slot.unfit)?);
        queue.fill(inputs)?;
        queue.send(inputs)?;
        queue.clear(unfit)?;
        queue.blend(&inputs.1, &outputs.1, &unfit.1, slot.sums.as_ref())?;
        queue.fetch(unfit, outputs)?;
        queue.hand_over(&outputs.1, &to, &slot.done)
    }

    /// Waits for all blocks and delivers them.
    ///
    /// # Errors
    /// As [`Blender::submit`]; the blocks after the first that fails are not delivered.
    pub fn flush(&mut self) -> Result<()> {
        let device = self.device.clone();
        let _bound = device.bind()?;
        let first = self.next % 2;
        self.slots[first].finish(&device)?;
        self.slots[1 - first].finish(&device)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        // The buffers must not be given back under a copy. What fails now failed before.
        let _bound = ContextGuard::new();
        let _ = self.stream.synchronize();
    }
}

/// The pair that `prepare` has just made.
fn pair<T>(slot: &mut Option<T>) -> Result<&mut T> {
    slot.as_mut().ok_or_else(|| Error::Internal("the blend has no buffers".into()))
}

impl Slot<'_> {
    /// Sees to it that the buffers are large enough.
    fn prepare(&mut self, device: &Arc<Device>, job: &Job<'_>) -> Result<()> {
        let inputs = job.input_bytes();
        let outputs = job.groups.last().map_or(0, |group| group.outputs + group.pitch * job.targets);
        grow(&mut self.inputs, device, inputs)?;
        grow(&mut self.outputs, device, outputs.max(job.packed * job.targets))?;
        grow(&mut self.unfit, device, 8 * job.groups.len() * job.targets)?;
        let most = job.groups.iter().map(|group| group.elements).max().unwrap_or(0);
        let sums = 8 * TARGETS.min(job.targets) * most.next_multiple_of(4);
        let several = job.stretches.iter().any(|stretch| stretch.sources.len() > SOURCES);
        if several && self.sums.as_ref().is_none_or(|buffer| buffer.len() < sums) {
            self.sums = None;
            self.sums = Some(Buffer::new(device, sums, "the sums of a blend")?);
        }
        Ok(())
    }

    /// Waits for the slot's block and delivers it.
    fn finish(&mut self, device: &Device) -> Result<()> {
        let Some(job) = self.job.take() else { return Ok(()) };
        self.stream.synchronize().map_err(device.driver_error("blend"))?;
        let (unfit, inputs) = (pair(&mut self.unfit)?, pair(&mut self.inputs)?);
        // SAFETY: the stream has no work left.
        let words = unsafe { unfit.0.bytes() };
        let found = words[..8 * job.groups.len() * job.targets].chunks_exact(8).position(|word| word != [0xff; 8]);
        if let Some(found) = found {
            let word = &words[8 * found..][..8];
            let element = u64::from_le_bytes(word.try_into().unwrap_or_default()) as usize;
            let (stretch, unfit) = job.explain(device, inputs, found / job.targets, found % job.targets, element)?;
            return Err((job.report)(stretch, unfit));
        }
        let Some(deliver) = job.deliver else { return Ok(()) };
        let outputs = pair(&mut self.outputs)?;
        // SAFETY: as above.
        let bytes = unsafe { outputs.0.bytes() };
        let results: Vec<&[u8]> = (0..job.targets).map(|target| &bytes[target * job.packed..][..job.packed]).collect();
        deliver(&results)
    }
}

/// Makes a pair of buffers at least so large; the old pair, idle now, is given back first.
fn grow(pair: &mut Option<(Pinned, Buffer)>, device: &Arc<Device>, bytes: usize) -> Result<()> {
    if pair.as_ref().is_none_or(|(pinned, _)| pinned.len() < bytes) {
        // A little more, so that slightly larger blocks do not each ask for more.
        let bytes = bytes.next_power_of_two();
        *pair = None;
        *pair = Some((Pinned::new(device, bytes)?, Buffer::new(device, bytes, "a block of snapshots")?));
    }
    Ok(())
}
