//! Blend of one tensor, in ranges of its elements.

use std::ops::Range;

use rayon::prelude::*;
use safetensors::Dtype;

use super::infinities;
use super::prefetch::Prefetcher;
use super::source_set::{Elements, ModelTensor, TensorSource, WeightedSources};
use crate::compute::cpu::{self, Overflow};
#[cfg(feature = "cuda")]
use crate::compute::cuda;
use crate::error::{Error, Result};

/// Distance in elements between a chunk and the one that is prefetched meanwhile.
const PREFETCH_DISTANCE: usize = 4 * cpu::CHUNK;

/// Bytes of all sources that are copied at a time, if they are not in one piece: they stay in a core's cache.
const COPIED_BYTES: usize = 1 << 18;

/// Averaged tensor, its elements in every source, and the weights of the sources.
pub(super) struct TensorBlend<'a> {
    tensor: &'a ModelTensor,
    sources: &'a [&'a dyn TensorSource],
    dtypes: Vec<Dtype>,
    stored: Vec<Elements<'a>>,
    weights: &'a [f64],
    output: Dtype,
}

impl<'a> TensorBlend<'a> {
    /// Looks the tensor up in every source. `output` is the dtype of the results.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a source lacks it.
    pub(super) fn new(weighted: &'a WeightedSources<'a>, tensor: &'a ModelTensor, output: Dtype) -> Result<Self> {
        let WeightedSources { sources, weights } = weighted;
        let mut dtypes = Vec::with_capacity(sources.len());
        let mut stored = Vec::with_capacity(sources.len());
        let mut place = 0;
        for source in sources {
            let Some((dtype, elements)) = source.stored_near(&tensor.name, &mut place) else {
                return Err(Error::tensor(&tensor.name, "a snapshot lacks it"));
            };
            dtypes.push(dtype);
            stored.push(elements);
        }
        Ok(TensorBlend { tensor, sources, dtypes, stored, weights, output })
    }

    /// Blends a range of elements into one slice per target. An infinity that all sources share stays.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a source is not in host memory, or if a sum does not fit the dtype of the results.
    pub(super) fn blend_range(&self, dst: &mut [&mut [u8]], elements: Range<usize>) -> Result<()> {
        let pieces = self.stored.iter().zip(&self.dtypes);
        let pieces = pieces.map(|(stored, &dtype)| stored.piece(byte_range(&elements, dtype)));
        match pieces.collect::<Option<Vec<&[u8]>>>() {
            Some(sources) => self.blend_slices(dst, &sources, elements.start),
            None => self.blend_copies(dst, elements),
        }
    }

    /// Blends a range of elements that some sources do not have in one piece: a stretch at a time is copied.
    fn blend_copies(&self, dst: &mut [&mut [u8]], elements: Range<usize>) -> Result<()> {
        let size = self.size();
        let each = (COPIED_BYTES / (self.bytes_read(1) as usize).max(1)).max(1);
        let mut copies = vec![Vec::new(); self.stored.len()];
        for start in elements.clone().step_by(each) {
            let stretch = start..elements.end.min(start + each);
            let mut sources: Vec<&[u8]> = Vec::with_capacity(copies.len());
            for ((copy, stored), &dtype) in copies.iter_mut().zip(&self.stored).zip(&self.dtypes) {
                let bytes = stored.read(byte_range(&stretch, dtype), copy);
                sources.push(bytes.ok_or_else(|| Error::on_device(&self.tensor.name))?);
            }
            let place = (start - elements.start) * size..(stretch.end - elements.start) * size;
            let mut dst: Vec<&mut [u8]> = dst.iter_mut().map(|dst| &mut dst[place.clone()]).collect();
            self.blend_slices(&mut dst, &sources, start)?;
        }
        Ok(())
    }

    fn blend_slices(&self, dst: &mut [&mut [u8]], sources: &[&[u8]], start: usize) -> Result<()> {
        let blend = cpu::Blend { dtypes: &self.dtypes, weights: self.weights, output: self.output };
        let blended = cpu::blend(dst, sources, &blend);
        let blended = blended.or_else(|overflow| infinities::blend_again(dst, sources, &blend, overflow));
        blended.map_err(|overflow| self.overflow_error(overflow, start))
    }

    /// Announces the reads of a range of elements, so that the disk fetches them ahead.
    pub(super) fn prefetch(&self, elements: Range<usize>) {
        // A system call for nothing costs as much as any other.
        if elements.is_empty() {
            return;
        }
        for ((source, stored), &dtype) in self.sources.iter().zip(&self.stored).zip(&self.dtypes) {
            let range = byte_range(&elements, dtype);
            match stored {
                Elements::Host(bytes) => source.will_need(&bytes[range]),
                Elements::Scattered(elements) => elements.will_need(range),
                #[cfg(feature = "cuda")]
                Elements::Device(_) => {}
            }
        }
    }

    /// Blends all elements of a single target.
    ///
    /// # Errors
    /// As [`TensorBlend::blend_range`].
    pub(super) fn blend_all(&self, dst: &mut [u8]) -> Result<()> {
        let size = self.size();
        let total = dst.len() / size;
        let prefetcher = Prefetcher::new();
        let chunks = dst.par_chunks_mut(cpu::CHUNK * size).enumerate();
        chunks.try_for_each(|(i, chunk)| {
            let start = i * cpu::CHUNK;
            let elements = start..start + chunk.len() / size;
            let next = start + PREFETCH_DISTANCE;
            let next = next.min(total)..(next + cpu::CHUNK).min(total);
            let bytes = self.bytes_read(elements.len());
            prefetcher.run(bytes, || self.prefetch(next), || self.blend_range(&mut [chunk], elements))
        })
    }

    /// Checks that every sum of a single target fits the dtype of the results, without keeping any.
    ///
    /// # Errors
    /// As [`TensorBlend::blend_range`].
    pub(super) fn check(&self, elements: usize) -> Result<()> {
        let size = self.size();
        let starts = (0..elements).into_par_iter().step_by(cpu::CHUNK);
        starts.try_for_each_init(
            || vec![0; cpu::CHUNK * size],
            |scratch, start| {
                let end = elements.min(start + cpu::CHUNK);
                self.blend_range(&mut [&mut scratch[..(end - start) * size]], start..end)
            },
        )
    }

    /// Size of an element of the results in bytes.
    pub(super) fn size(&self) -> usize {
        self.output.bitsize() / 8
    }

    /// Bytes of all sources that a blend of `elements` elements reads.
    pub(super) fn bytes_read(&self, elements: usize) -> u64 {
        self.dtypes.iter().map(|dtype| (dtype.bitsize() / 8 * elements) as u64).sum()
    }

    fn overflow_error(&self, overflow: Overflow, start: usize) -> Error {
        overflow_error(&self.tensor.name, self.output, overflow, start)
    }
}

/// Range of bytes that holds a range of elements.
fn byte_range(elements: &Range<usize>, dtype: Dtype) -> Range<usize> {
    let size = dtype.bitsize() / 8;
    elements.start * size..elements.end * size
}

/// Error for a sum that does not fit the dtype `output`. The blended range begins at element `start` of the tensor.
pub(super) fn overflow_error(tensor: &str, output: Dtype, overflow: Overflow, start: usize) -> Error {
    let value = overflow.value;
    let element = start + overflow.element;
    let reason = if value.is_finite() {
        format!("the average is {value} at element {element}, beyond {output}: choose bf16 or f32")
    } else {
        format!("the average is {value} at element {element}: a snapshot holds values that are not finite")
    };
    Error::tensor(tensor, reason)
}

/// Parts of a blend on a device.
#[cfg(feature = "cuda")]
impl<'a> TensorBlend<'a> {
    /// Device that holds the tensor in some of the sources; `None` if all of them are on the host.
    pub(super) fn device(&self) -> Option<usize> {
        self.sources.iter().find_map(|source| source.device_of(&self.tensor.name))
    }

    /// Weights of target 0 for all sources, then those of target 1, and so on.
    pub(super) fn weights(&self) -> &'a [f64] {
        self.weights
    }

    /// Returns true if both blends have the same sources with the same weights.
    pub(super) fn has_weights_of(&self, other: &TensorBlend<'_>) -> bool {
        std::ptr::eq(self.weights, other.weights)
    }

    /// Number of elements of the tensor.
    pub(super) fn elements(&self) -> usize {
        self.tensor.shape.iter().product()
    }

    /// Error of this tensor.
    pub(super) fn error(&self, reason: String) -> Error {
        Error::tensor(&self.tensor.name, reason)
    }

    /// Input of a device's blend of a range of elements.
    pub(super) fn on_device(&self, elements: Range<usize>) -> cuda::BlendPart<'a> {
        let mut sources = Vec::with_capacity(self.stored.len());
        for (stored, &dtype) in self.stored.iter().zip(&self.dtypes) {
            let input = match *stored {
                Elements::Host(bytes) => cuda::BlendInput::Host(bytes),
                Elements::Scattered(elements) => {
                    cuda::BlendInput::Scattered { elements, start: 0, bytes: elements.len() }
                }
                Elements::Device(input) => input,
            };
            sources.push(input.slice(byte_range(&elements, dtype)));
        }
        cuda::BlendPart { sources, dtypes: self.dtypes.clone(), output: self.output, elements: elements.len() }
    }

    /// Origin of a range that begins at element `start`, for its errors.
    pub(super) fn origin(&self, start: usize) -> Origin<'a> {
        Origin { tensor: &self.tensor.name, output: self.output, start }
    }
}

/// Origin of a blended range: tensor, dtype of the results, and first element.
#[cfg(feature = "cuda")]
pub(super) struct Origin<'a> {
    tensor: &'a str,
    output: Dtype,
    start: usize,
}

#[cfg(feature = "cuda")]
impl Origin<'_> {
    pub(super) fn overflow_error(&self, overflow: Overflow) -> Error {
        overflow_error(self.tensor, self.output, overflow, self.start)
    }
}
