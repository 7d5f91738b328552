//! One pass over the sources into files: a block of the output at a time is blended for all targets and written.

use std::ops::Range;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use rayon::prelude::*;

use super::blend::TensorBlend;
use super::files::{OutputFiles, Shards};
use super::options::WriteOptions;
use super::prefetch::Prefetcher;
use super::progress::PassProgress;
use super::source_set::{LaterSelection, ModelTensor, Selection, SourceSet, WeightedSources};
#[cfg(feature = "cuda")]
use super::{device_blocks, on_device};
#[cfg(feature = "cuda")]
use crate::compute::cuda;
use crate::error::Result;

/// Bytes of results that all threads together buffer, if threads times targets are at most 4,096.
const BUFFERED_BYTES: usize = 16 << 20;

/// Fewest elements that a thread blends before it writes.
const MIN_BLOCK_ELEMENTS: usize = 1 << 9;

/// Most elements that a thread blends before it writes.
const MAX_BLOCK_ELEMENTS: usize = 1 << 18;

/// Bytes of all sources in a block. Each thread blends one block and may prefetch [`BLOCKS_AHEAD`] more.
const READ_BYTES: usize = 32 << 20;

/// Number of blocks that are prefetched.
const BLOCKS_AHEAD: usize = 2;

/// One pass over a selection: its tensors and the files of its targets.
pub(super) struct Streaming<'a> {
    /// Averaged tensors in the order of the files.
    tensors: Vec<PlacedBlend<'a>>,
    /// Number of elements before each tensor, then the number of all elements.
    before: Vec<usize>,
    /// Elements that are blended and written.
    share: Range<usize>,
    /// Files of each target.
    files: &'a [OutputFiles],
    progress: PassProgress<'a>,
    prefetcher: Prefetcher,
}

/// Blend of an averaged tensor, and the tensor's place in the data section of a file.
struct PlacedBlend<'a> {
    blend: TensorBlend<'a>,
    file: usize,
    offset: usize,
    /// Size of an element of the result in bytes.
    size: usize,
}

/// Range of one tensor: its elements, its bytes in a block's buffer, and its offset in the data section of a file.
struct OutputSpan {
    tensor: usize,
    elements: Range<usize>,
    buffer: Range<usize>,
    file: usize,
    offset: usize,
}

impl<'a> Streaming<'a> {
    /// Prepares a pass over a selection of `set`, with the files of each target. Tensors whose sources are computed
    /// are left to [`Streaming::of_group`]. Only elements within the share of all data sections are written.
    ///
    /// # Errors
    /// As [`TensorBlend::new`].
    pub(super) fn new(
        set: &'a SourceSet<'a>,
        selection: &'a Selection<'a>,
        shards: &Shards,
        files: &'a [OutputFiles],
        share: &Range<usize>,
        options: &'a WriteOptions<'a>,
    ) -> Result<Self> {
        let sources = |tensor: &ModelTensor| {
            (tensor.averaged && !selection.is_computed(&tensor.name)).then(|| selection.of(&tensor.name))
        };
        Streaming::of(set, &sources, shards, files, share, options)
    }

    /// Prepares a pass over a group of tensors whose sources were computed.
    ///
    /// # Errors
    /// As [`TensorBlend::new`].
    pub(super) fn of_group(
        set: &'a SourceSet<'a>,
        group: &'a LaterSelection<'a>,
        shards: &Shards,
        files: &'a [OutputFiles],
        share: &Range<usize>,
        options: &'a WriteOptions<'a>,
    ) -> Result<Self> {
        let sources = |tensor: &ModelTensor| group.tensors.contains(&tensor.name).then_some(&group.weighted);
        Streaming::of(set, &sources, shards, files, share, options)
    }

    /// Prepares a pass over the tensors that have `sources`.
    fn of(
        set: &'a SourceSet<'a>,
        sources: &dyn Fn(&ModelTensor) -> Option<&'a WeightedSources<'a>>,
        shards: &Shards,
        files: &'a [OutputFiles],
        share: &Range<usize>,
        options: &'a WriteOptions<'a>,
    ) -> Result<Self> {
        let mut tensors = Vec::new();
        let mut before = vec![0];
        let mut elements = 0..0;
        for location in shards.locations() {
            let tensor = &set.tensors[location.tensor];
            let Some(sources) = sources(tensor) else { continue };
            let size = location.dtype.bitsize() / 8;
            let blend = TensorBlend::new(sources, tensor, location.dtype)?;
            let own = location.elements_in(share, size);
            elements.start += own.start;
            elements.end += own.end;
            before.push(before[tensors.len()] + location.range.len() / size);
            tensors.push(PlacedBlend { blend, file: location.file, offset: location.range.start, size });
        }
        Ok(Streaming {
            tensors,
            before,
            share: elements,
            files,
            progress: PassProgress::new(options.progress),
            prefetcher: Prefetcher::new(),
        })
    }

    /// Blends and writes all averaged tensors on the CPU, after a device could not.
    ///
    /// # Errors
    /// As [`Streaming::run`].
    #[cfg(feature = "cuda")]
    pub(super) fn run_again(&self) -> Result<()> {
        self.progress.restart();
        self.run()
    }

    /// Blends and writes all averaged tensors on the CPU.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) and [`Error::Io`](crate::Error::Io).
    pub(super) fn run(&self) -> Result<()> {
        let Range { start, end } = self.share;
        let each = self.block_elements();
        (0..self.elements().div_ceil(each)).into_par_iter().try_for_each_init(
            || vec![Vec::new(); self.files.len()],
            |buffers, block| self.block(start + block * each..end.min(start + (block + 1) * each), buffers),
        )
    }

    /// Number of elements in a block, so that the blocks of all threads stay within [`BUFFERED_BYTES`].
    fn block_elements(&self) -> usize {
        let bytes_per_element = self.files.len() * size_of::<f64>() * rayon::current_num_threads();
        let buffered = BUFFERED_BYTES / bytes_per_element;
        let read = READ_BYTES / self.source_bytes().max(1);
        buffered.min(read).clamp(MIN_BLOCK_ELEMENTS, MAX_BLOCK_ELEMENTS)
    }

    /// Splits a range of all averaged elements into spans of one tensor each.
    fn spans(&self, elements: Range<usize>) -> Vec<OutputSpan> {
        let first = self.before.partition_point(|&before| before <= elements.start).saturating_sub(1);
        let mut spans = Vec::new();
        let mut filled = 0;
        for tensor in first..self.tensors.len() {
            let PlacedBlend { file, offset, size, .. } = self.tensors[tensor];
            let own = self.before[tensor]..self.before[tensor + 1];
            if own.start >= elements.end {
                break;
            }
            let start = own.start.max(elements.start);
            let end = own.end.min(elements.end);
            if start < end {
                let bytes = (end - start) * size;
                spans.push(OutputSpan {
                    tensor,
                    elements: start - own.start..end - own.start,
                    buffer: filled..filled + bytes,
                    file,
                    offset: offset + (start - own.start) * size,
                });
                filled += bytes;
            }
        }
        spans
    }

    /// Blends and writes a block, and prefetches the next ones.
    fn block(&self, elements: Range<usize>, buffers: &mut [Vec<u8>]) -> Result<()> {
        let spans = self.spans(elements.clone());
        let next = elements.end..self.share.end.min(elements.end + BLOCKS_AHEAD * elements.len());
        let bytes = self.bytes_read(&spans);
        self.prefetcher.run(bytes, || self.prefetch(next), || self.blend(&spans, buffers))?;
        let results: Vec<&[u8]> = buffers.iter().map(Vec::as_slice).collect();
        self.write(&spans, &results)?;
        self.progress.add(bytes);
        Ok(())
    }

    /// Announces the reads of some elements.
    fn prefetch(&self, elements: Range<usize>) {
        for OutputSpan { tensor, elements, .. } in self.spans(elements) {
            self.tensors[tensor].blend.prefetch(elements);
        }
    }

    /// Blends spans into one buffer for each target.
    fn blend(&self, spans: &[OutputSpan], buffers: &mut [Vec<u8>]) -> Result<()> {
        let total = spans.last().map_or(0, |last| last.buffer.end);
        buffers.iter_mut().for_each(|buffer| buffer.resize(total, 0));
        for OutputSpan { tensor, elements, buffer, .. } in spans {
            let mut dst: Vec<&mut [u8]> = buffers.iter_mut().map(|whole| &mut whole[buffer.clone()]).collect();
            self.tensors[*tensor].blend.blend_range(&mut dst, elements.clone())?;
        }
        Ok(())
    }

    /// Writes the results of each target to their places in its files.
    fn write(&self, spans: &[OutputSpan], results: &[&[u8]]) -> Result<()> {
        // Spans that are adjacent in a file, as nearly all are, are written together.
        let is_adjacent = |a: &OutputSpan, b: &OutputSpan| a.file == b.file && a.offset + a.buffer.len() == b.offset;
        for group in spans.chunk_by(is_adjacent) {
            let bytes = group[0].buffer.start..group[group.len() - 1].buffer.end;
            results.par_iter().zip(self.files).try_for_each(|(results, files)| {
                files.write_at(group[0].file, group[0].offset, &results[bytes.clone()])
            })?;
        }
        Ok(())
    }

    /// Bytes of all sources that the blend of some spans reads.
    fn bytes_read(&self, spans: &[OutputSpan]) -> u64 {
        spans.iter().map(|span| self.tensors[span.tensor].blend.bytes_read(span.elements.len())).sum()
    }

    /// Largest number of bytes that an element takes in all sources together.
    fn source_bytes(&self) -> usize {
        self.tensors.iter().map(|placed| placed.blend.bytes_read(1) as usize).max().unwrap_or(0)
    }

    /// Number of averaged elements in the share.
    pub(super) fn elements(&self) -> usize {
        self.share.len()
    }

    /// Blends the first `elements` elements on the CPU, as [`Streaming::run`] does, and discards the results.
    #[cfg(feature = "cuda")]
    pub(super) fn try_cpu(&self, elements: usize) -> Result<()> {
        let (start, end) = (self.share.start, self.share.start + elements);
        let each = self.block_elements();
        (0..elements.div_ceil(each)).into_par_iter().try_for_each_init(
            || vec![Vec::new(); self.files.len()],
            |buffers, block| {
                self.blend(&self.spans(start + block * each..end.min(start + (block + 1) * each)), buffers)
            },
        )
    }
}

#[cfg(feature = "cuda")]
impl Streaming<'_> {
    /// Blends all averaged tensors on a device, and writes them.
    ///
    /// # Errors
    /// As [`Streaming::run`], and [`Error::Cuda`](crate::Error::Cuda).
    pub(super) fn run_on(&self, device: &Arc<cuda::CudaDevice>) -> Result<()> {
        let mut blender = cuda::Blender::new(device)?;
        for block in self.device_blocks(self.share.clone()) {
            let spans = self.spans(block);
            let parts = self.parts(&spans);
            let deliver = move |results: &[&[u8]]| {
                self.write(&spans, results)?;
                self.progress.add(self.bytes_read(&spans));
                Ok(())
            };
            on_device::submit(&mut blender, &parts, self.files.len(), cuda::Destination::Host(Box::new(deliver)))?;
        }
        blender.flush()
    }

    /// Blends the first `elements` elements on a device, and discards the results.
    pub(super) fn try_on<'s>(&'s self, blender: &mut cuda::Blender<'s>, elements: usize) -> Result<()> {
        for block in self.device_blocks(self.share.start..self.share.start + elements) {
            let parts = self.parts(&self.spans(block));
            on_device::submit(blender, &parts, self.files.len(), cuda::Destination::Host(Box::new(|_| Ok(()))))?;
        }
        blender.flush()
    }

    /// Cuts elements into blocks of a device: all tensors of a block have the same weights.
    fn device_blocks(&self, elements: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut starts = vec![elements.start];
        let pairs = self.tensors.windows(2).enumerate();
        let changes = pairs.filter(|(_, pair)| !pair[0].blend.has_weights_of(&pair[1].blend));
        starts.extend(changes.map(|(i, _)| self.before[i + 1]));
        starts.retain(|start| elements.contains(start));
        starts.push(elements.end);
        let each = self.bytes_per_element();
        let ranges: Vec<Range<usize>> = starts.windows(2).map(|pair| pair[0]..pair[1]).collect();
        ranges.into_iter().flat_map(move |range| {
            device_blocks::blocks(range.len(), each)
                .map(move |block| range.start + block.start..range.start + block.end)
        })
    }

    fn parts<'s>(&'s self, spans: &[OutputSpan]) -> Vec<on_device::Part<'s>> {
        spans.iter().map(|span| (&self.tensors[span.tensor].blend, span.elements.clone())).collect()
    }

    /// Largest number of bytes that an element takes in all sources and results together.
    pub(super) fn bytes_per_element(&self) -> usize {
        let results = self.tensors.iter().map(|placed| placed.size).max().unwrap_or(0);
        self.source_bytes() + self.files.len() * results
    }
}
