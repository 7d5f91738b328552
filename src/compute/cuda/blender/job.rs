//! A block of stretches: what is blended, how it is grouped, and where everything lies in a slot's buffers.

use std::ops::Range;

use cudarc::driver::result;
use safetensors::Dtype;

use super::{Deliver, Delivery, Input, Report, Stretch};
use crate::compute::cpu::{self, Blend, Overflow};
use crate::compute::cuda::Device;
use crate::compute::cuda::memory::{Buffer, Pinned};
use crate::error::{Error, Result};
use crate::tensor::CudaMemoryMut;

/// Every area of a slot begins at a multiple of this, as the kernels' vectors want it.
const ALIGNMENT: usize = 16;

/// A block that is under way.
pub(super) struct Job<'a> {
    pub groups: Vec<Group>,
    pub stretches: Vec<Stretch<'a>>,
    pub weights: &'a [f64],
    pub targets: usize,
    pub deliver: Option<Deliver<'a>>,
    pub report: Report<'a>,
    /// The bytes of a target's results.
    pub packed: usize,
}

/// Neighbouring stretches with equal dtypes: they are blended by one launch, their elements side by side.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub stretches: Range<usize>,
    pub elements: usize,
    /// Where each source's elements begin in the inputs.
    pub sources: Vec<usize>,
    /// Where each target's results begin in the outputs, and the distance from target to target.
    pub outputs: usize,
    pub pitch: usize,
    /// The bytes of a target's results, and those before them when the results of all groups are packed.
    pub bytes: usize,
    pub before: usize,
}

/// Checks that everything is as long as the rest of it says.
pub(super) fn check(
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
pub(super) fn group(stretches: &[Stretch<'_>], targets: usize) -> Vec<Group> {
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

impl Job<'_> {
    /// The bytes of all areas for inputs.
    pub(super) fn input_bytes(&self) -> usize {
        let Some(group) = self.groups.last() else { return 0 };
        let dtype = self.stretches[group.stretches.start].dtypes.last();
        let last = group.elements * dtype.map_or(0, |dtype| dtype.bitsize() / 8);
        group.sources.last().map_or(0, |start| start + last.next_multiple_of(ALIGNMENT))
    }

    /// Finds out what an unfit sum is, by the CPU, from the inputs that are on the device still.
    pub(super) fn explain(
        &self,
        device: &Device,
        inputs: &(Pinned, Buffer),
        group: usize,
        target: usize,
        element: usize,
    ) -> Result<(usize, Overflow)> {
        let group = &self.groups[group];
        let first = &self.stretches[group.stretches.start];
        let count = first.dtypes.len();
        let mut values = vec![[0u8; 8]; count];
        for ((value, dtype), start) in values.iter_mut().zip(&first.dtypes).zip(&group.sources) {
            let size = dtype.bitsize() / 8;
            let from = inputs.1.address() + (start + element * size) as u64;
            // SAFETY: within the inputs, and the stream has no work left that writes them.
            unsafe { result::memcpy_dtoh_sync(&mut value[..size], from) }
                .map_err(device.driver_error("read an element"))?;
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
        Ok((stretch, Overflow { target, element, value }))
    }
}
