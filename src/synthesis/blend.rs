//! Blending stretches of tensors from a selection of sources.

use std::ops::Range;

use rayon::prelude::*;
use safetensors::Dtype;

use super::prefetch::Prefetcher;
use super::source_set::{Elements, ModelTensor, Selection, TensorSource};
use crate::compute::cpu::{self, Overflow};
#[cfg(feature = "cuda")]
use crate::compute::cuda;
use crate::error::{Error, Result};

/// How far ahead of a chunk the next one is asked for, in elements.
const AHEAD: usize = 4 * cpu::CHUNK;

/// The sources of one averaged tensor, ready to be blended.
pub(super) struct TensorBlend<'a> {
    tensor: &'a ModelTensor,
    holders: &'a [&'a dyn TensorSource],
    dtypes: Vec<Dtype>,
    stored: Vec<Elements<'a>>,
    weights: &'a [f64],
    output: Dtype,
}

impl<'a> TensorBlend<'a> {
    /// Looks the tensor up in every source.
    pub(super) fn new(selection: &'a Selection<'a>, tensor: &'a ModelTensor, output: Dtype) -> Result<Self> {
        let mut place = 0;
        let find = |holder: &&'a dyn TensorSource| {
            holder
                .stored_near(&tensor.name, &mut place)
                .ok_or_else(|| Error::tensor(&tensor.name, "a snapshot lacks it"))
        };
        let stored: Vec<(Dtype, Elements<'_>)> = selection.holders.iter().map(find).collect::<Result<_>>()?;
        let (dtypes, stored) = stored.into_iter().unzip();
        Ok(TensorBlend { tensor, holders: &selection.holders, dtypes, stored, weights: &selection.weights, output })
    }

    /// Blends a range of elements into one slice per target.
    pub(super) fn stretch(&self, dst: &mut [&mut [u8]], elements: Range<usize>) -> Result<()> {
        let cut = |(stored, dtype): (&Elements<'a>, &Dtype)| {
            let size = dtype.bitsize() / 8;
            let bytes = stored.host().ok_or_else(|| Error::on_device(&self.tensor.name))?;
            Ok(&bytes[elements.start * size..elements.end * size])
        };
        let sources: Vec<&[u8]> = self.stored.iter().zip(&self.dtypes).map(cut).collect::<Result<_>>()?;
        let blend = cpu::Blend { dtypes: &self.dtypes, weights: self.weights, output: self.output };
        cpu::blend(dst, &sources, &blend).map_err(|unfit| self.unfit(unfit, elements.start))
    }

    /// Has what the blend of a range of elements will read fetched from the disk, where it lies there.
    pub(super) fn ask_for(&self, elements: Range<usize>) {
        // The last stretch has none after it, and even a call for nothing costs as much as any.
        if elements.is_empty() {
            return;
        }
        for ((holder, stored), dtype) in self.holders.iter().zip(&self.stored).zip(&self.dtypes) {
            let size = dtype.bitsize() / 8;
            if let Some(bytes) = stored.host() {
                holder.will_need(&bytes[elements.start * size..elements.end * size]);
            }
        }
    }

    /// Blends the whole tensor of a single target.
    pub(super) fn whole(&self, dst: &mut [u8]) -> Result<()> {
        let size = self.output.bitsize() / 8;
        let (total, ahead) = (dst.len() / size, Prefetcher::new());
        let chunks = dst.par_chunks_mut(cpu::CHUNK * size).enumerate();
        chunks.try_for_each(|(i, chunk)| {
            let start = i * cpu::CHUNK;
            let elements = start..start + chunk.len() / size;
            let next = (start + AHEAD).min(total)..(start + AHEAD + cpu::CHUNK).min(total);
            let bytes = self.bytes_read(elements.len());
            ahead.around(bytes, || self.ask_for(next), || self.stretch(&mut [chunk], elements))
        })
    }

    /// Checks that every sum of a single target fits, without keeping any.
    pub(super) fn check(&self, elements: usize) -> Result<()> {
        let size = self.output.bitsize() / 8;
        let starts = (0..elements).into_par_iter().step_by(cpu::CHUNK);
        starts.try_for_each_init(
            || vec![0; cpu::CHUNK * size],
            |scratch, start| {
                let end = elements.min(start + cpu::CHUNK);
                self.stretch(&mut [&mut scratch[..(end - start) * size]], start..end)
            },
        )
    }

    /// The size of an element of the results.
    pub(super) fn size(&self) -> usize {
        self.output.bitsize() / 8
    }

    /// The bytes of all sources that a blend of so many elements reads.
    pub(super) fn bytes_read(&self, elements: usize) -> u64 {
        self.dtypes.iter().map(|dtype| (dtype.bitsize() / 8 * elements) as u64).sum()
    }

    fn unfit(&self, unfit: Overflow, start: usize) -> Error {
        unfit_error(&self.tensor.name, self.output, unfit, start)
    }
}

/// The error for a sum that a dtype cannot hold, in a stretch of a tensor that begins at element `start`.
fn unfit_error(tensor: &str, output: Dtype, unfit: Overflow, start: usize) -> Error {
    let (value, element) = (unfit.value, start + unfit.element);
    let reason = if value.is_finite() {
        format!("the average is {value} at element {element}, beyond {output}: choose bf16 or f32")
    } else {
        format!("the average is {value} at element {element}: a snapshot holds values that are not finite")
    };
    Error::tensor(tensor, reason)
}

/// What a device needs of it.
#[cfg(feature = "cuda")]
impl<'a> TensorBlend<'a> {
    /// The weights of target 0 for all sources, then those of target 1, and so on.
    pub(super) fn weights(&self) -> &'a [f64] {
        self.weights
    }

    /// The number of elements.
    pub(super) fn elements(&self) -> usize {
        self.tensor.shape.iter().product()
    }

    /// An error of this tensor.
    pub(super) fn error(&self, reason: String) -> Error {
        Error::tensor(&self.tensor.name, reason)
    }

    /// The dtype of the results.
    pub(super) fn output(&self) -> Dtype {
        self.output
    }

    /// A range of elements, to be blended on a device.
    pub(super) fn on_device(&self, elements: Range<usize>) -> cuda::BlendPart<'a> {
        let cut = |(stored, dtype): (&Elements<'a>, &Dtype)| {
            let size = dtype.bitsize() / 8;
            let input = match *stored {
                Elements::Host(bytes) => cuda::BlendInput::Host(bytes),
                Elements::Device(input) => input,
            };
            input.slice(elements.start * size..elements.end * size)
        };
        let sources = self.stored.iter().zip(&self.dtypes).map(cut).collect();
        cuda::BlendPart { sources, dtypes: self.dtypes.clone(), output: self.output, elements: elements.len() }
    }

    /// What the error of a stretch names: the tensor, the dtype of the results, and the stretch's first element.
    pub(super) fn origin(&self, start: usize) -> Origin<'a> {
        Origin { tensor: &self.tensor.name, output: self.output, start }
    }
}

/// Where a stretch comes from.
#[cfg(feature = "cuda")]
pub(super) struct Origin<'a> {
    tensor: &'a str,
    output: Dtype,
    start: usize,
}

#[cfg(feature = "cuda")]
impl Origin<'_> {
    pub(super) fn unfit(&self, unfit: Overflow) -> Error {
        unfit_error(self.tensor, self.output, unfit, self.start)
    }
}
