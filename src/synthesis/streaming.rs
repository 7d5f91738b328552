//! One pass over the sources: a block of the output at a time, blended for all targets and written at its place.

use std::ops::Range;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use rayon::prelude::*;

use super::blend::TensorBlend;
use super::files::{OutputFiles, Shards};
#[cfg(feature = "cuda")]
use super::on_device;
use super::output::WriteOptions;
use super::prefetch::Prefetcher;
use super::source_set::{Selection, SourceSet};
#[cfg(feature = "cuda")]
use crate::compute::cuda;
use crate::error::Result;

/// Bytes of results that all threads together hold at a time, as long as threads times targets are at most 4,096.
const BUFFERED: usize = 16 << 20;

/// The elements that a thread blends before it writes: at most, and at least.
const BLOCK_ELEMENTS: (usize, usize) = (1 << 18, 1 << 9);

/// Bytes of all sources in a block, of which each thread may have one at work and [`BLOCKS_AHEAD`] asked for.
const READ: usize = 32 << 20;

/// How many blocks a disk is asked for ahead.
const BLOCKS_AHEAD: usize = 2;

/// What a pass works on.
pub(super) struct Streaming<'a> {
    /// The averaged tensors, in the order of the file.
    tensors: Vec<Placed<'a>>,
    /// The elements before each tensor, and at last those of all.
    before: Vec<usize>,
    /// Those of each target.
    files: &'a [OutputFiles],
    options: &'a WriteOptions<'a>,
    ahead: Prefetcher,
}

/// An averaged tensor, ready to be blended, and its place in the data section of a file.
struct Placed<'a> {
    blend: TensorBlend<'a>,
    file: usize,
    offset: usize,
    /// The size of an element of the result.
    size: usize,
}

/// A stretch of one tensor, as bytes of a block's buffer and of the data section of a file.
struct Stretch {
    tensor: usize,
    elements: Range<usize>,
    buffer: Range<usize>,
    file: usize,
    offset: usize,
}

impl<'a> Streaming<'a> {
    pub(super) fn new(
        pool: &'a SourceSet<'a>,
        selection: &'a Selection<'a>,
        shards: &Shards,
        files: &'a [OutputFiles],
        options: &'a WriteOptions<'a>,
    ) -> Result<Self> {
        let (mut tensors, mut before) = (Vec::new(), vec![0]);
        for spot in shards.spots().filter(|spot| pool.tensors[spot.tensor].averaged) {
            let size = spot.dtype.bitsize() / 8;
            let blend = TensorBlend::new(selection, &pool.tensors[spot.tensor], spot.dtype)?;
            before.push(before[tensors.len()] + spot.range.len() / size);
            tensors.push(Placed { blend, file: spot.file, offset: spot.range.start, size });
        }
        Ok(Streaming { tensors, before, files, options, ahead: Prefetcher::new() })
    }

    /// Blends and writes everything.
    pub(super) fn run(&self) -> Result<()> {
        let (total, each) = (self.elements(), self.block_elements());
        (0..total.div_ceil(each)).into_par_iter().try_for_each_init(
            || vec![Vec::new(); self.files.len()],
            |buffers, block| self.block(block * each..total.min((block + 1) * each), buffers),
        )
    }

    /// The elements of a block: so few that the blocks of all threads stay within what may be buffered.
    fn block_elements(&self) -> usize {
        let held = self.files.len() * size_of::<f64>() * rayon::current_num_threads();
        let (most, least) = BLOCK_ELEMENTS;
        (BUFFERED / held).min(READ / self.source_bytes().max(1)).clamp(least, most)
    }

    /// The stretches that a range of all averaged elements is made of.
    fn stretches(&self, elements: Range<usize>) -> Vec<Stretch> {
        let first = self.before.partition_point(|&before| before <= elements.start).saturating_sub(1);
        let (mut stretches, mut filled) = (Vec::new(), 0);
        for tensor in first..self.tensors.len() {
            let Placed { file, offset, size, .. } = self.tensors[tensor];
            let own = self.before[tensor]..self.before[tensor + 1];
            let (start, end) = (own.start.max(elements.start), own.end.min(elements.end));
            if own.start >= elements.end {
                break;
            }
            if start < end {
                let bytes = (end - start) * size;
                stretches.push(Stretch {
                    tensor,
                    elements: start - own.start..end - own.start,
                    buffer: filled..filled + bytes,
                    file,
                    offset: offset + (start - own.start) * size,
                });
                filled += bytes;
            }
        }
        stretches
    }

    fn block(&self, elements: Range<usize>, buffers: &mut [Vec<u8>]) -> Result<()> {
        let stretches = self.stretches(elements.clone());
        let next = elements.end..self.elements().min(elements.end + BLOCKS_AHEAD * elements.len());
        self.ahead.around(self.bytes_read(&stretches), || self.ask_for(next), || self.blend(&stretches, buffers))?;
        let results: Vec<&[u8]> = buffers.iter().map(Vec::as_slice).collect();
        self.write(&stretches, &results)?;
        self.report(self.bytes_read(&stretches));
        Ok(())
    }

    /// Asks for what the blend of some elements will read.
    fn ask_for(&self, elements: Range<usize>) {
        for Stretch { tensor, elements, .. } in self.stretches(elements) {
            self.tensors[tensor].blend.ask_for(elements);
        }
    }

    /// Blends stretches into one buffer for each target.
    fn blend(&self, stretches: &[Stretch], buffers: &mut [Vec<u8>]) -> Result<()> {
        let total = stretches.last().map_or(0, |last| last.buffer.end);
        buffers.iter_mut().for_each(|buffer| buffer.resize(total, 0));
        for Stretch { tensor, elements, buffer, .. } in stretches {
            let mut dst: Vec<&mut [u8]> = buffers.iter_mut().map(|whole| &mut whole[buffer.clone()]).collect();
            self.tensors[*tensor].blend.stretch(&mut dst, elements.clone())?;
        }
        Ok(())
    }

    /// Writes the results of each target at their places.
    fn write(&self, stretches: &[Stretch], results: &[&[u8]]) -> Result<()> {
        // Stretches that lie side by side in a file, as they all but always do, are written together.
        let adjacent = |a: &Stretch, b: &Stretch| a.file == b.file && a.offset + a.buffer.len() == b.offset;
        for group in stretches.chunk_by(adjacent) {
            let bytes = group[0].buffer.start..group[group.len() - 1].buffer.end;
            results.par_iter().zip(self.files).try_for_each(|(results, files)| {
                files.write_at(group[0].file, group[0].offset, &results[bytes.clone()])
            })?;
        }
        Ok(())
    }

    /// The bytes of all sources that the blend of some stretches reads.
    fn bytes_read(&self, stretches: &[Stretch]) -> u64 {
        let read = |stretch: &Stretch| self.tensors[stretch.tensor].blend.bytes_read(stretch.elements.len());
        stretches.iter().map(read).sum()
    }

    /// The most bytes that an element takes in all sources.
    fn source_bytes(&self) -> usize {
        self.tensors.iter().map(|placed| placed.blend.bytes_read(1) as usize).max().unwrap_or(0)
    }

    /// The elements of all averaged tensors.
    pub(super) fn elements(&self) -> usize {
        self.before[self.tensors.len()]
    }

    /// Blends the first so many elements on the CPU, as [`Streaming::run`] would, and writes nothing.
    #[cfg(feature = "cuda")]
    pub(super) fn try_cpu(&self, elements: usize) -> Result<()> {
        let each = self.block_elements();
        (0..elements.div_ceil(each)).into_par_iter().try_for_each_init(
            || vec![Vec::new(); self.files.len()],
            |buffers, block| self.blend(&self.stretches(block * each..elements.min((block + 1) * each)), buffers),
        )
    }

    fn report(&self, bytes: u64) {
        if let Some(progress) = self.options.progress {
            progress(bytes);
        }
    }
}

#[cfg(feature = "cuda")]
impl Streaming<'_> {
    /// As [`Streaming::run`], blended on a device.
    pub(super) fn run_on(&self, device: &Arc<cuda::CudaDevice>) -> Result<()> {
        let mut blender = cuda::Blender::new(device)?;
        for block in on_device::blocks(self.elements(), self.bytes_per_element()) {
            let stretches = self.stretches(block);
            let parts = self.parts(&stretches);
            let deliver = move |results: &[&[u8]]| {
                self.write(&stretches, results)?;
                self.report(self.bytes_read(&stretches));
                Ok(())
            };
            on_device::submit(&mut blender, &parts, self.files.len(), cuda::Destination::Host(Box::new(deliver)))?;
        }
        blender.flush()
    }

    /// Blends the first so many elements on a device, and writes nothing.
    pub(super) fn try_on<'s>(&'s self, blender: &mut cuda::Blender<'s>, elements: usize) -> Result<()> {
        for block in on_device::blocks(elements, self.bytes_per_element()) {
            let parts = self.parts(&self.stretches(block));
            on_device::submit(blender, &parts, self.files.len(), cuda::Destination::Host(Box::new(|_| Ok(()))))?;
        }
        blender.flush()
    }

    fn parts<'s>(&'s self, stretches: &[Stretch]) -> Vec<on_device::Part<'s>> {
        let part = |stretch: &Stretch| (&self.tensors[stretch.tensor].blend, stretch.elements.clone());
        stretches.iter().map(part).collect()
    }

    /// The most bytes that an element takes in all sources and results.
    pub(super) fn bytes_per_element(&self) -> usize {
        let results = self.tensors.iter().map(|placed| placed.size).max().unwrap_or(0);
        self.source_bytes() + self.files.len() * results
    }
}
