//! Blending stretches of tensors from a selection of sources.

use std::ops::Range;

use rayon::prelude::*;
use safetensors::Dtype;

use super::pool::{PoolTensor, Selection};
use crate::compute::cpu::{self, Unfit};
use crate::error::{Error, Result};

/// The sources of one averaged tensor, ready to be blended.
pub(super) struct TensorBlend<'a> {
    tensor: &'a PoolTensor,
    dtypes: Vec<Dtype>,
    bytes: Vec<&'a [u8]>,
    weights: &'a [f64],
    output: Dtype,
}

impl<'a> TensorBlend<'a> {
    /// Looks the tensor up in every source.
    pub(super) fn new(selection: &'a Selection<'a>, tensor: &'a PoolTensor, output: Dtype) -> Result<Self> {
        let find = |holder: &&'a dyn super::Holder| {
            holder.stored(&tensor.name).ok_or_else(|| Error::tensor(&tensor.name, "a snapshot lacks it"))
        };
        let stored: Vec<(Dtype, &[u8])> = selection.holders.iter().map(find).collect::<Result<_>>()?;
        let (dtypes, bytes) = stored.into_iter().unzip();
        Ok(TensorBlend { tensor, dtypes, bytes, weights: &selection.weights, output })
    }

    /// Blends a range of elements into one slice per target.
    pub(super) fn stretch(&self, dst: &mut [&mut [u8]], elements: Range<usize>) -> Result<()> {
        let cut = |(bytes, dtype): (&&'a [u8], &Dtype)| {
            let size = dtype.bitsize() / 8;
            &bytes[elements.start * size..elements.end * size]
        };
        let sources: Vec<&[u8]> = self.bytes.iter().zip(&self.dtypes).map(cut).collect();
        let blend = cpu::Blend { dtypes: &self.dtypes, weights: self.weights, output: self.output };
        cpu::blend(dst, &sources, &blend).map_err(|unfit| self.unfit(unfit, elements.start))
    }

    /// Blends the whole tensor of a single target.
    pub(super) fn whole(&self, dst: &mut [u8]) -> Result<()> {
        let size = self.output.bitsize() / 8;
        let chunks = dst.par_chunks_mut(cpu::CHUNK * size).enumerate();
        chunks.try_for_each(|(i, chunk)| {
            let start = i * cpu::CHUNK;
            let elements = start..start + chunk.len() / size;
            self.stretch(&mut [chunk], elements)
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

    /// The bytes of all sources that a blend of so many elements reads.
    pub(super) fn bytes_read(&self, elements: usize) -> u64 {
        self.dtypes.iter().map(|dtype| (dtype.bitsize() / 8 * elements) as u64).sum()
    }

    fn unfit(&self, unfit: Unfit, start: usize) -> Error {
        let (value, element) = (unfit.value, start + unfit.element);
        let reason = if value.is_finite() {
            format!("the average is {value} at element {element}, beyond {}: choose bf16 or f32", self.output)
        } else {
            format!("the average is {value} at element {element}: a snapshot holds values that are not finite")
        };
        Error::tensor(&self.tensor.name, reason)
    }
}
