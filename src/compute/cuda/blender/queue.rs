//! Work that is queued on a slot's stream for one block.

use std::ops::Range;

use cudarc::driver::{CudaStream, result};

use super::fill::host_ranges;
use super::job::{BlendJob, LaunchGroup, for_each_input, group_parts};
use super::{BlendInput, BlendPart, MirroredBuffer, OverflowHandler};
use crate::compute::cpu;
use crate::compute::cuda::CudaDevice;
use crate::compute::cuda::device::Event;
use crate::compute::cuda::kernels::{BlendArgs, MAX_SOURCES, MAX_TARGETS, kind};
use crate::compute::cuda::memory::{Buffer, copy_on_device, copy_to_device, copy_to_host};
use crate::error::{Error, Result};
use crate::tensor::CudaMemory;

/// Queue of one block's work. The methods are called in their order.
pub(super) struct JobQueue<'q, 'a> {
    pub device: &'q CudaDevice,
    pub stream: &'q CudaStream,
    pub job: &'q BlendJob<'a>,
}

/// Copy within the device, to an offset in the inputs.
struct InputCopy {
    source: usize,
    at: usize,
    from: u64,
    bytes: usize,
}

impl InputCopy {
    /// Returns true if another copy of the same source begins where this one ends, on both sides. Other sources may be
    /// in other allocations, which no copy may cross.
    fn is_continued_by(&self, source: usize, at: usize, from: u64) -> bool {
        (self.source, self.at + self.bytes, self.from + self.bytes as u64) == (source, at, from)
    }
}

impl JobQueue<'_, '_> {
    /// Queues the copy of the pinned inputs over the bus, and that of the inputs on the device.
    pub(super) fn send(&self, inputs: &MirroredBuffer) -> Result<()> {
        let to = inputs.device.address();
        for Range { start, end } in host_ranges(&self.job.groups, &self.job.parts) {
            let device = to + start as u64;
            // SAFETY: both have these bytes, which do not change until `finish` has waited.
            unsafe { copy_to_device(self.device, self.stream, device, &inputs.host, start, end - start) }?;
        }
        // Tensors of an average that lie side by side are one copy.
        let mut copies: Vec<InputCopy> = Vec::new();
        for_each_input(&self.job.groups, &self.job.parts, |source, at, input| {
            let BlendInput::Device { address, bytes } = input else { return };
            match copies.last_mut() {
                Some(last) if last.is_continued_by(source, at, address) => last.bytes += bytes,
                _ => copies.push(InputCopy { source, at, from: address, bytes }),
            }
        });
        copies.iter().try_for_each(|InputCopy { at, from, bytes, .. }| {
            // SAFETY: the place is as long as the source, which its owner keeps allocated.
            unsafe { copy_on_device(self.device, self.stream, to + *at as u64, *from, *bytes) }
        })
    }

    /// Queues the reset of all first overflowing elements to the largest number, which means none.
    pub(super) fn clear(&self, overflows: &MirroredBuffer) -> Result<()> {
        let bytes = 8 * self.job.groups.len() * self.job.targets;
        // SAFETY: we own the buffer, which has that many bytes.
        unsafe { result::memset_d8_async(overflows.device.address(), 0xff, bytes, self.stream.cu_stream()) }
            .map_err(self.device.driver_error("clear memory"))
    }

    /// Queues the launches of each group, for 8 targets and 52 sources at a time.
    pub(super) fn blend(
        &self,
        inputs: &Buffer,
        outputs: &Buffer,
        overflows: &Buffer,
        sums: Option<&Buffer>,
    ) -> Result<()> {
        for (g, group) in self.job.groups.iter().enumerate().filter(|(_, group)| group.elements > 0) {
            let words = overflows.address() + (8 * g * self.job.targets) as u64;
            for first in (0..self.job.targets).step_by(MAX_TARGETS) {
                let targets = MAX_TARGETS.min(self.job.targets - first);
                let count = group.sources.len();
                for start in (0..count).step_by(MAX_SOURCES) {
                    let sources = start..count.min(start + MAX_SOURCES);
                    let mut args = self.args(group, sources, first..first + targets, inputs, outputs);
                    args.sums = sums.map_or(0, Buffer::address);
                    args.overflow = words + 8 * first as u64;
                    // SAFETY: all addresses are in the slot's buffers, which live until `finish` has waited.
                    unsafe { self.device.kernels.blend(self.stream, &args, targets) }
                        .map_err(self.device.driver_error("launch the blend"))?;
                }
            }
        }
        Ok(())
    }

    /// Returns the arguments of a launch, except for the addresses of sums and overflows.
    fn args(
        &self,
        group: &LaunchGroup,
        sources: Range<usize>,
        targets: Range<usize>,
        inputs: &Buffer,
        outputs: &Buffer,
    ) -> BlendArgs {
        let part = &self.job.parts[group.parts.start];
        let count = group.sources.len();
        let mut args = BlendArgs {
            elements: group.elements as u64,
            pitch: group.elements.next_multiple_of(4) as u64,
            limit: cpu::max_finite(part.output).unwrap_or(f64::MAX),
            output: kind(part.output),
            first: u32::from(sources.start == 0),
            last: u32::from(sources.end == count),
            aligned: 1,
            ..BlendArgs::default()
        };
        for (m, target) in targets.clone().enumerate() {
            args.targets[m] = outputs.address() + (group.outputs + target * group.pitch) as u64;
        }
        let mut end = 0;
        for (r, run) in part.dtypes[sources.clone()].chunk_by(|a, b| a == b).enumerate() {
            end += run.len();
            args.runs = r as u32 + 1;
            args.ends[r] = end as u8;
            args.kinds[r] = kind(run[0]) as u8;
        }
        for (i, k) in sources.enumerate() {
            args.sources[i] = inputs.address() + group.sources[k] as u64;
            for (m, target) in targets.clone().enumerate() {
                args.weights[i * targets.len() + m] = self.job.weights[target * count + k];
            }
        }
        args
    }

    /// Queues the copies to the host: the overflows, and the results if a callback receives them.
    pub(super) fn fetch(&self, overflows: &MirroredBuffer, outputs: &MirroredBuffer) -> Result<()> {
        let bytes = 8 * self.job.groups.len() * self.job.targets;
        // SAFETY: both have that many bytes, and the host does not read them before `finish` has waited.
        unsafe { copy_to_host(self.device, self.stream, &overflows.host, 0, overflows.device.address(), bytes) }?;
        if self.job.deliver.is_none() {
            return Ok(());
        }
        for group in &self.job.groups {
            for target in 0..self.job.targets {
                let from = outputs.device.address() + (group.outputs + target * group.pitch) as u64;
                let to = target * self.job.packed + group.before;
                // SAFETY: as above.
                unsafe { copy_to_host(self.device, self.stream, &outputs.host, to, from, group.bytes) }?;
            }
        }
        Ok(())
    }

    /// Queues the copies into memory of another library, in the order of its stream, and records the end of the block.
    pub(super) fn deliver_on_device(
        &self,
        outputs: &Buffer,
        to: &[CudaMemory<'_>],
        owner: Option<&CudaStream>,
        done: &Event,
    ) -> Result<()> {
        let order = || self.device.driver_error("order two streams");
        if let Some(owner) = owner {
            done.record(owner).map_err(order())?;
            self.stream.wait(done).map_err(order())?;
        }
        for group in &self.job.groups {
            let mut from = outputs.address() + group.outputs as u64;
            for memory in to.iter().take(group.parts.end).skip(group.parts.start) {
                // SAFETY: the memory is lent for writing, and `check_sizes` has compared its size with the part's.
                unsafe { copy_on_device(self.device, self.stream, memory.address, from, memory.bytes) }?;
                from += memory.bytes as u64;
            }
        }
        done.record(self.stream).map_err(order())?;
        if let Some(owner) = owner {
            owner.wait(done).map_err(order())?;
        }
        Ok(())
    }
}

/// Memory for the launches of one part whose inputs are already on the device. Each source, and the results of each
/// target, begin at the next multiple of 16 bytes.
pub(in crate::compute::cuda) struct ResidentBlend<'r> {
    pub inputs: &'r Buffer,
    pub outputs: &'r Buffer,
    pub overflows: &'r Buffer,
    pub sums: Option<&'r Buffer>,
}

impl ResidentBlend<'_> {
    /// Queues the launches of a block, without its copies. The memory must live until they have run.
    pub fn queue(&self, device: &CudaDevice, stream: &CudaStream, part: BlendPart<'_>, weights: &[f64]) -> Result<()> {
        let targets = weights.len() / part.dtypes.len().max(1);
        let parts = vec![part];
        let groups = group_parts(&parts, targets);
        let on_overflow: OverflowHandler<'_> =
            Box::new(|_, overflow| Error::Internal(format!("a sum is {}", overflow.value)));
        let job = BlendJob { groups, parts, weights, targets, deliver: None, on_overflow, packed: 0 };
        let group = &job.groups[0];
        let sums = 8 * MAX_TARGETS.min(targets) * group.elements.next_multiple_of(4);
        let fits = job.input_bytes() <= self.inputs.len()
            && group.pitch * targets <= self.outputs.len()
            && 8 * targets <= self.overflows.len()
            && (group.sources.len() <= MAX_SOURCES || self.sums.is_some_and(|buffer| sums <= buffer.len()));
        assert!(fits, "the memory is too small for a blend of {} elements", group.elements);
        let queue = JobQueue { device, stream, job: &job };
        queue.blend(self.inputs, self.outputs, self.overflows, self.sums)
    }
}
