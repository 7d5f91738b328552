//! Blending on a device what lies on the host: stretches of tensors travel through pinned memory, are blended, and the
//! results travel back or into somebody's memory on the device. Two slots take turns, so that one is filled by the CPU
//! while the other is on the bus or being blended.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaStream, result};
use rayon::prelude::*;
use safetensors::Dtype;

use super::Device;
use super::device::{Bound, Event, Stream};
use super::kernels::{BlendArgs, SOURCES, TARGETS, kind};
use super::memory::{Buffer, Pinned, copy_in, copy_out, copy_within};
use crate::compute::cpu::{self, Blend, Unfit};
use crate::error::{Error, Result};
use crate::tensor::{CudaMemory, CudaMemoryMut};

/// Bytes that one thread moves into a pinned buffer at a time.
const PIECE: usize = 1 << 20;

/// Every area of a slot begins at a multiple of this, as the kernels' vectors want it.
const ALIGNMENT: usize = 16;

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
pub type Report<'a> = Box<dyn FnOnce(usize, Unfit) -> Error + 'a>;

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

/// A block that is under way.
struct Job<'a> {
    groups: Vec<Group>,
    stretches: Vec<Stretch<'a>>,
    weights: &'a [f64],
    targets: usize,
    deliver: Option<Deliver<'a>>,
    report: Report<'a>,
    /// The bytes of a target's results.
    packed: usize,
}

/// Neighbouring stretches with equal dtypes: they are blended by one launch, their elements side by side.
#[derive(Clone, Debug)]
struct Group {
    stretches: Range<usize>,
    elements: usize,
    /// Where each source's elements begin in the inputs.
    sources: Vec<usize>,
    /// Where each target's results begin in the outputs, and the distance from target to target.
    outputs: usize,
    pitch: usize,
    /// The bytes of a target's results, and those before them when the results of all groups are packed.
    bytes: usize,
    before: usize,
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
        let _bound = Bound::new();
        let _ = self.stream.synchronize();
    }
}

/// The pair that `prepare` has just made.
fn pair<T>(slot: &mut Option<T>) -> Result<&mut T> {
    slot.as_mut().ok_or_else(|| Error::Nothing("the blend has no buffers".into()))
}

/// Checks that everything is as long as the rest of it says.
fn check(
    device: &Device,
    stretches: &[Stretch<'_>],
    weights: &[f64],
    targets: usize,
    delivery: &Delivery<'_, '_>,
) -> Result<()> {
    let whole = |stretch: &Stretch<'_>| {
        let fits = |(source, dtype): (&Input<'_>, &Dtype)| source.len() == stretch.elements * dtype.bitsize() / 8;
        let counts = stretch.sources.len() == stretch.dtypes.len() && stretch.dtypes.len() * targets == weights.len();
        counts && stretch.sources.iter().zip(&stretch.dtypes).all(fits)
    };
    let delivered = match delivery {
        Delivery::Host(_) => true,
        Delivery::Device(to) => {
            let fits = |(memory, stretch): (&CudaMemoryMut<'_>, &Stretch<'_>)| {
                let bytes = stretch.elements * stretch.output.bitsize() / 8;
                memory.0.device == device.number() && memory.0.bytes == bytes
            };
            targets == 1 && to.len() == stretches.len() && to.iter().zip(stretches).all(fits)
        }
    };
    if stretches.iter().all(whole) && delivered {
        return Ok(());
    }
    let reason = "sources, weights and results are not of one size".into();
    Err(Error::Cuda { device: device.number(), action: "blend".into(), reason })
}

/// Puts neighbouring stretches of equal dtypes together and gives every group its places.
fn group(stretches: &[Stretch<'_>], targets: usize) -> Vec<Group> {
    let (mut groups, mut first) = (Vec::new(), 0);
    let (mut input, mut output, mut before) = (0, 0, 0);
    for run in stretches.chunk_by(|a, b| a.dtypes == b.dtypes && a.output == b.output) {
        let elements = run.iter().map(|stretch| stretch.elements).sum::<usize>();
        let mut place = |dtype: &Dtype| {
            let start = input;
            input += (elements * dtype.bitsize() / 8).next_multiple_of(ALIGNMENT);
            start
        };
        let sources = run[0].dtypes.iter().map(&mut place).collect();
        let bytes = elements * run[0].output.bitsize() / 8;
        let pitch = bytes.next_multiple_of(ALIGNMENT);
        let stretches = first..first + run.len();
        first = stretches.end;
        groups.push(Group { stretches, elements, sources, outputs: output, pitch, bytes, before });
        output += pitch * targets;
        before += bytes;
    }
    groups
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
        self.stream.synchronize().map_err(device.refused("blend"))?;
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

impl Job<'_> {
    /// The bytes of all areas for inputs.
    fn input_bytes(&self) -> usize {
        let Some(group) = self.groups.last() else { return 0 };
        let dtype = self.stretches[group.stretches.start].dtypes.last();
        let last = group.elements * dtype.map_or(0, |dtype| dtype.bitsize() / 8);
        group.sources.last().map_or(0, |start| start + last.next_multiple_of(ALIGNMENT))
    }

    /// Finds out what an unfit sum is, by the CPU, from the inputs that are on the device still.
    fn explain(
        &self,
        device: &Device,
        inputs: &(Pinned, Buffer),
        group: usize,
        target: usize,
        element: usize,
    ) -> Result<(usize, Unfit)> {
        let group = &self.groups[group];
        let first = &self.stretches[group.stretches.start];
        let count = first.dtypes.len();
        let mut values = vec![[0u8; 8]; count];
        for ((value, dtype), start) in values.iter_mut().zip(&first.dtypes).zip(&group.sources) {
            let size = dtype.bitsize() / 8;
            let from = inputs.1.address() + (start + element * size) as u64;
            // SAFETY: within the inputs, and the stream has no work left that writes them.
            unsafe { result::memcpy_dtoh_sync(&mut value[..size], from) }.map_err(device.refused("read an element"))?;
        }
        let sources: Vec<&[u8]> = values.iter().zip(&first.dtypes).map(|(v, d)| &v[..d.bitsize() / 8]).collect();
        let weights = &self.weights[target * count..][..count];
        let blend = Blend { dtypes: &first.dtypes, weights, output: first.output };
        let mut result = [0u8; 8];
        let outcome = cpu::blend(&mut [&mut result[..first.output.bitsize() / 8]], &sources, &blend);
        let value = outcome.err().map_or(f64::NAN, |unfit| unfit.value);
        let (mut stretch, mut element) = (group.stretches.start, element);
        while element >= self.stretches[stretch].elements {
            element -= self.stretches[stretch].elements;
            stretch += 1;
        }
        Ok((stretch, Unfit { target, element, value }))
    }
}

/// What is queued for one block, step by step.
struct Queue<'q, 'a> {
    device: &'q Device,
    stream: &'q CudaStream,
    job: &'q Job<'a>,
}

impl<'a> Queue<'_, 'a> {
    /// Calls `act` with every source of every stretch, in the order of their places, which is passed too.
    fn each_input(&self, mut act: impl FnMut(usize, Input<'a>)) {
        for group in &self.job.groups {
            for (k, &start) in group.sources.iter().enumerate() {
                let mut at = start;
                for stretch in &self.job.stretches[group.stretches.clone()] {
                    act(at, stretch.sources[k]);
                    at += stretch.sources[k].len();
                }
            }
        }
    }

    /// Moves what lies on the host into pinned memory, with all threads.
    fn fill(&self, (pinned, _): &mut (Pinned, Buffer)) -> Result<()> {
        // SAFETY: the slot's earlier block is finished, so nothing reads or writes the buffer.
        let mut rest = unsafe { pinned.bytes_mut() };
        let (mut taken, mut pieces) = (0, Vec::new());
        self.each_input(|at, input| {
            let Input::Host(bytes) = input else { return };
            let (_, tail) = std::mem::take(&mut rest).split_at_mut(at - taken);
            let (own, tail) = tail.split_at_mut(bytes.len());
            (rest, taken) = (tail, at + bytes.len());
            pieces.extend(own.chunks_mut(PIECE).zip(bytes.chunks(PIECE)));
        });
        pieces.into_par_iter().for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }

    /// Queues the copy over the bus, and that of what is on the device already.
    fn send(&self, (pinned, buffer): &(Pinned, Buffer)) -> Result<()> {
        // SAFETY: both are so long, and stay as they are until `finish` has waited.
        unsafe { copy_in(self.device, self.stream, buffer.address(), pinned, 0, self.job.input_bytes()) }?;
        let mut outcome = Ok(());
        self.each_input(|at, input| {
            if let (Input::Device { address, bytes }, Ok(())) = (input, &outcome) {
                // SAFETY: the place is as long as the source, which its owner keeps.
                outcome =
                    unsafe { copy_within(self.device, self.stream, buffer.address() + at as u64, address, bytes) };
            }
        });
        outcome
    }

    /// Queues the setting of all "first unfit element" to none: the largest number.
    fn clear(&self, (_, words): &(Pinned, Buffer)) -> Result<()> {
        let bytes = 8 * self.job.groups.len() * self.job.targets;
        // SAFETY: the buffer is ours and so long.
        unsafe { result::memset_d8_async(words.address(), 0xff, bytes, self.stream.cu_stream()) }
            .map_err(self.device.refused("clear memory"))
    }

    /// Queues the launches: for each group, 8 targets at a time, 64 sources at a time.
    fn blend(&self, inputs: &Buffer, outputs: &Buffer, unfit: &Buffer, sums: Option<&Buffer>) -> Result<()> {
        for (g, group) in self.job.groups.iter().enumerate().filter(|(_, group)| group.elements > 0) {
            let words = unfit.address() + (8 * g * self.job.targets) as u64;
            for first in (0..self.job.targets).step_by(TARGETS) {
                let targets = TARGETS.min(self.job.targets - first);
                let count = group.sources.len();
                for start in (0..count).step_by(SOURCES) {
                    let sources = start..count.min(start + SOURCES);
                    let mut args = self.args(group, sources, first..first + targets, inputs, outputs);
                    args.sums = sums.map_or(0, Buffer::address);
                    args.unfit = words + 8 * first as u64;
                    // SAFETY: all addresses are of the slot's buffers, which live until `finish` has waited.
                    unsafe { self.device.kernels.blend(self.stream, &args, targets) }
                        .map_err(self.device.refused("launch the blend"))?;
                }
            }
        }
        Ok(())
    }

    fn args(
        &self,
        group: &Group,
        sources: Range<usize>,
        targets: Range<usize>,
        inputs: &Buffer,
        outputs: &Buffer,
    ) -> BlendArgs {
        let stretch = &self.job.stretches[group.stretches.start];
        let count = group.sources.len();
        let mut args = BlendArgs {
            elements: group.elements as u64,
            pitch: group.elements.next_multiple_of(4) as u64,
            limit: cpu::max_finite(stretch.output).unwrap_or(f64::MAX),
            count: sources.len() as u32,
            output: kind(stretch.output),
            first: u32::from(sources.start == 0),
            last: u32::from(sources.end == count),
            aligned: 1,
            ..BlendArgs::default()
        };
        for (m, target) in targets.clone().enumerate() {
            args.targets[m] = outputs.address() + (group.outputs + target * group.pitch) as u64;
        }
        for (i, k) in sources.enumerate() {
            args.sources[i] = inputs.address() + group.sources[k] as u64;
            args.kinds[i] = kind(stretch.dtypes[k]) as u8;
            for (m, target) in targets.clone().enumerate() {
                args.weights[i * targets.len() + m] = self.job.weights[target * count + k];
            }
        }
        args
    }

    /// Queues the way back of what the host looks at.
    fn fetch(&self, unfit: &(Pinned, Buffer), outputs: &(Pinned, Buffer)) -> Result<()> {
        let bytes = 8 * self.job.groups.len() * self.job.targets;
        // SAFETY: both are so long; nobody looks at the pinned one before `finish` has waited.
        unsafe { copy_out(self.device, self.stream, &unfit.0, 0, unfit.1.address(), bytes) }?;
        if self.job.deliver.is_none() {
            return Ok(());
        }
        for group in &self.job.groups {
            for target in 0..self.job.targets {
                let from = outputs.1.address() + (group.outputs + target * group.pitch) as u64;
                let to = target * self.job.packed + group.before;
                // SAFETY: as above.
                unsafe { copy_out(self.device, self.stream, &outputs.0, to, from, group.bytes) }?;
            }
        }
        Ok(())
    }

    /// Queues the way into somebody's memory, in the order of its stream, and marks the end of the block.
    fn hand_over(&self, outputs: &Buffer, to: &[CudaMemory<'_>], done: &Event) -> Result<()> {
        let order = || self.device.refused("order two streams");
        let owner = to.first().map(|memory| self.device.borrow_stream(memory.stream));
        if let Some(owner) = &owner {
            done.record(owner).map_err(order())?;
            self.stream.wait(done).map_err(order())?;
        }
        for group in &self.job.groups {
            let mut from = outputs.address() + group.outputs as u64;
            for memory in to.iter().take(group.stretches.end).skip(group.stretches.start) {
                // SAFETY: the memory is lent for writing, and is as long as the stretch: its view was checked.
                unsafe { copy_within(self.device, self.stream, memory.address, from, memory.bytes) }?;
                from += memory.bytes as u64;
            }
        }
        done.record(self.stream).map_err(order())?;
        if let Some(owner) = &owner {
            owner.wait(done).map_err(order())?;
        }
        Ok(())
    }
}

/// Memory for the launches of one stretch alone: the inputs are there already, each source at the next multiple of 16
/// bytes, and so will be the results of each target.
#[cfg(feature = "report")]
pub(super) struct Resident<'r> {
    pub inputs: &'r Buffer,
    pub outputs: &'r Buffer,
    pub unfit: &'r Buffer,
    pub sums: Option<&'r Buffer>,
}

#[cfg(feature = "report")]
impl Resident<'_> {
    /// Queues the launches of a block, without its copies; the memory must live until they have run.
    pub fn blend(&self, device: &Device, stream: &CudaStream, stretch: Stretch<'_>, weights: &[f64]) -> Result<()> {
        let (targets, stretches) = (weights.len() / stretch.dtypes.len().max(1), vec![stretch]);
        let groups = group(&stretches, targets);
        let report: Report<'_> = Box::new(|_, unfit| Error::Nothing(format!("a sum is {}", unfit.value)));
        let job = Job { groups, stretches, weights, targets, deliver: None, report, packed: 0 };
        let group = &job.groups[0];
        let sums = 8 * TARGETS.min(targets) * group.elements.next_multiple_of(4);
        let fits = job.input_bytes() <= self.inputs.len()
            && group.pitch * targets <= self.outputs.len()
            && 8 * targets <= self.unfit.len()
            && (group.sources.len() <= SOURCES || self.sums.is_some_and(|buffer| sums <= buffer.len()));
        assert!(fits, "the memory is too small for a blend of {} elements", group.elements);
        let queue = Queue { device, stream, job: &job };
        queue.blend(self.inputs, self.outputs, self.unfit, self.sums)
    }
}

impl Default for BlendArgs {
    fn default() -> Self {
        BlendArgs {
            sources: [0; SOURCES],
            targets: [0; TARGETS],
            weights: [0.0; SOURCES * TARGETS],
            sums: 0,
            pitch: 0,
            unfit: 0,
            elements: 0,
            limit: 0.0,
            count: 0,
            output: 0,
            first: 0,
            last: 0,
            aligned: 0,
            kinds: [0; SOURCES],
            padding: 0,
        }
    }
}
