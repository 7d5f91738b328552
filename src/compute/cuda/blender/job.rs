//! Job of one block: its parts, their groups, and the layout of a slot's buffers.

use std::ops::Range;

use cudarc::driver::{CudaStream, result};
use safetensors::Dtype;

use super::{BlendInput, BlendPart, Deliver, Destination, OverflowHandler};
use crate::compute::cpu::{self, Blend, Overflow};
use crate::compute::cuda::CudaDevice;
use crate::compute::cuda::memory::Buffer;
use crate::error::{Error, Result};
use crate::tensor::CudaMemoryMut;

/// Alignment in bytes of every area of a slot, which the kernels' vectors need.
pub(super) const ALIGNMENT: usize = 16;

/// Block whose work is queued.
pub(super) struct BlendJob<'a> {
    pub groups: Vec<LaunchGroup>,
    pub parts: Vec<BlendPart<'a>>,
    pub weights: &'a [f64],
    pub targets: usize,
    pub deliver: Option<Deliver<'a>>,
    pub on_overflow: OverflowHandler<'a>,
    /// Bytes of a target's results.
    pub packed: usize,
}

/// Neighbouring parts with equal dtypes. One launch blends them, with their elements side by side.
#[derive(Clone, Debug)]
pub(super) struct LaunchGroup {
    /// Indices of the parts.
    pub parts: Range<usize>,
    /// Elements of all parts.
    pub elements: usize,
    /// Offset of each source's elements in the inputs.
    pub sources: Vec<usize>,
    /// Offset of the first target's results in the outputs.
    pub outputs: usize,
    /// Distance from target to target in the outputs.
    pub pitch: usize,
    /// Bytes of a target's results.
    pub bytes: usize,
    /// Bytes before them if the results of all groups are packed.
    pub before: usize,
}

/// Checks that sources, weights and results have consistent sizes.
pub(super) fn check_sizes(
    device: &CudaDevice,
    parts: &[BlendPart<'_>],
    weights: &[f64],
    targets: usize,
    destination: &Destination<'_, '_>,
) -> Result<()> {
    let consistent = |part: &BlendPart<'_>| {
        let fits = |(source, dtype): (&BlendInput<'_>, &Dtype)| source.len() == part.elements * dtype.bitsize() / 8;
        let counts = part.sources.len() == part.dtypes.len() && part.dtypes.len() * targets == weights.len();
        counts && part.sources.iter().zip(&part.dtypes).all(fits)
    };
    let deliverable = match destination {
        Destination::Host(_) => true,
        Destination::Device(to) => {
            let fits = |(memory, part): (&CudaMemoryMut<'_>, &BlendPart<'_>)| {
                let bytes = part.elements * part.output.bitsize() / 8;
                memory.0.device == device.number() && memory.0.bytes == bytes
            };
            targets == 1 && to.len() == parts.len() && to.iter().zip(parts).all(fits)
        }
    };
    if parts.iter().all(consistent) && deliverable {
        return Ok(());
    }
    let reason = "the sizes of sources, weights and results differ".into();
    Err(Error::Cuda { device: device.number(), action: "blend".into(), reason })
}

/// Groups neighbouring parts of equal dtypes and lays the groups out in the buffers.
pub(super) fn group_parts(parts: &[BlendPart<'_>], targets: usize) -> Vec<LaunchGroup> {
    let mut groups = Vec::new();
    let mut first = 0;
    let mut input = 0;
    let mut output = 0;
    let mut before = 0;
    for run in parts.chunk_by(|a, b| a.dtypes == b.dtypes && a.output == b.output) {
        let elements = run.iter().map(|part| part.elements).sum::<usize>();
        let mut sources = Vec::with_capacity(run[0].dtypes.len());
        for dtype in &run[0].dtypes {
            sources.push(input);
            input += (elements * dtype.bitsize() / 8).next_multiple_of(ALIGNMENT);
        }
        let bytes = elements * run[0].output.bitsize() / 8;
        let pitch = bytes.next_multiple_of(ALIGNMENT);
        let parts = first..first + run.len();
        first = parts.end;
        groups.push(LaunchGroup { parts, elements, sources, outputs: output, pitch, bytes, before });
        output += pitch * targets;
        before += bytes;
    }
    groups
}

/// Calls `act` with the number of the source, the offset and the input of every source of every part, in the order of
/// the offsets.
pub(super) fn for_each_input<'a>(
    groups: &[LaunchGroup],
    parts: &[BlendPart<'a>],
    mut act: impl FnMut(usize, usize, BlendInput<'a>),
) {
    for group in groups {
        for (k, &start) in group.sources.iter().enumerate() {
            let mut at = start;
            for part in &parts[group.parts.clone()] {
                act(k, at, part.sources[k]);
                at += part.sources[k].len();
            }
        }
    }
}

impl<'a> BlendJob<'a> {
    pub(super) fn new(
        parts: Vec<BlendPart<'a>>,
        weights: &'a [f64],
        targets: usize,
        deliver: Option<Deliver<'a>>,
        on_overflow: OverflowHandler<'a>,
    ) -> BlendJob<'a> {
        let groups = group_parts(&parts, targets);
        let packed = groups.last().map_or(0, |group| group.before + group.bytes);
        BlendJob { groups, parts, weights, targets, deliver, on_overflow, packed }
    }

    /// Returns the bytes of the inputs of all groups.
    pub(super) fn input_bytes(&self) -> usize {
        let Some(group) = self.groups.last() else { return 0 };
        let dtype = self.parts[group.parts.start].dtypes.last();
        let last = group.elements * dtype.map_or(0, |dtype| dtype.bitsize() / 8);
        group.sources.last().map_or(0, |start| start + last.next_multiple_of(ALIGNMENT))
    }

    /// Returns the part and the value of an overflow. The CPU computes the sum again from the inputs on the device.
    pub(super) fn locate(
        &self,
        device: &CudaDevice,
        stream: &CudaStream,
        inputs: &Buffer,
        group: usize,
        target: usize,
        element: usize,
    ) -> Result<(usize, Overflow)> {
        let group = &self.groups[group];
        let first = &self.parts[group.parts.start];
        let count = first.dtypes.len();
        let mut values = vec![[0u8; 8]; count];
        for ((value, dtype), start) in values.iter_mut().zip(&first.dtypes).zip(&group.sources) {
            let size = dtype.bitsize() / 8;
            let from = inputs.address() + (start + element * size) as u64;
            // Not by the synchronous call, which uses the default stream: it breaks captures of blocking streams.
            // SAFETY: it is within the inputs, which no pending work writes. The value is read after the wait below.
            unsafe { result::memcpy_dtoh_async(&mut value[..size], from, stream.cu_stream()) }
                .map_err(device.driver_error("read an element"))?;
        }
        stream.synchronize().map_err(device.driver_error("read an element"))?;
        let sources: Vec<&[u8]> = values.iter().zip(&first.dtypes).map(|(v, d)| &v[..d.bitsize() / 8]).collect();
        let weights = &self.weights[target * count..][..count];
        let blend = Blend { dtypes: &first.dtypes, weights, output: first.output };
        let mut result = [0u8; 8];
        let outcome = cpu::blend(&mut [&mut result[..first.output.bitsize() / 8]], &sources, &blend);
        let value = outcome.err().map_or(f64::NAN, |overflow| overflow.value);
        let mut part = group.parts.start;
        let mut element = element;
        while element >= self.parts[part].elements {
            element -= self.parts[part].elements;
            part += 1;
        }
        Ok((part, Overflow { target, element, value }))
    }
}
