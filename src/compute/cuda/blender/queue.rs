//! What is queued on a slot's stream for one block.

use std::ops::Range;

use cudarc::driver::{CudaStream, result};
use rayon::prelude::*;

use super::Input;
use super::job::{Group, Job};
use super::{Report, Stretch, job::group};
use crate::compute::cpu;
use crate::compute::cuda::Device;
use crate::compute::cuda::device::Event;
use crate::compute::cuda::kernels::{BlendArgs, SOURCES, TARGETS, kind};
use crate::compute::cuda::memory::{Buffer, Pinned, copy_in, copy_out, copy_within};
use crate::error::Error;
use crate::error::Result;
use crate::tensor::CudaMemory;

/// Bytes that one thread moves into a pinned buffer at a time.
const PIECE: usize = 1 << 20;

/// What is queued for one block, step by step.
pub(super) struct Queue<'q, 'a> {
    pub device: &'q Device,
    pub stream: &'q CudaStream,
    pub job: &'q Job<'a>,
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
    pub(super) fn fill(&self, (pinned, _): &mut (Pinned, Buffer)) -> Result<()> {
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
    pub(super) fn send(&self, (pinned, buffer): &(Pinned, Buffer)) -> Result<()> {
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
    pub(super) fn clear(&self, (_, words): &(Pinned, Buffer)) -> Result<()> {
        let bytes = 8 * self.job.groups.len() * self.job.targets;
        // SAFETY: the buffer is ours and so long.
        unsafe { result::memset_d8_async(words.address(), 0xff, bytes, self.stream.cu_stream()) }
            .map_err(self.device.driver_error("clear memory"))
    }

    /// Queues the launches: for each group, 8 targets at a time, 64 sources at a time.
    pub(super) fn blend(&self, inputs: &Buffer, outputs: &Buffer, unfit: &Buffer, sums: Option<&Buffer>) -> Result<()> {
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
                        .map_err(self.device.driver_error("launch the blend"))?;
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
    pub(super) fn fetch(&self, unfit: &(Pinned, Buffer), outputs: &(Pinned, Buffer)) -> Result<()> {
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
    pub(super) fn hand_over(&self, outputs: &Buffer, to: &[CudaMemory<'_>], done: &Event) -> Result<()> {
        let order = || self.device.driver_error("order two streams");
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
pub(in crate::compute::cuda) struct Resident<'r> {
    pub inputs: &'r Buffer,
    pub outputs: &'r Buffer,
    pub unfit: &'r Buffer,
    pub sums: Option<&'r Buffer>,
}

impl Resident<'_> {
    /// Queues the launches of a block, without its copies; the memory must live until they have run.
    pub fn blend(&self, device: &Device, stream: &CudaStream, stretch: Stretch<'_>, weights: &[f64]) -> Result<()> {
        let (targets, stretches) = (weights.len() / stretch.dtypes.len().max(1), vec![stretch]);
        let groups = group(&stretches, targets);
        let report: Report<'_> = Box::new(|_, unfit| Error::Internal(format!("a sum is {}", unfit.value)));
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
