//! One pass over the sources: a block of the output at a time, blended for all targets and written at its place.

use std::ops::Range;

use rayon::prelude::*;

use super::blend::TensorBlend;
use super::output::WriteOptions;
use super::pool::{Pool, Selection};
use crate::error::Result;
use crate::snapshot::{AtomicFile, FileLayout};

/// Bytes of results that all threads together hold at a time, on machines of up to a hundred threads or so.
const BUFFERED: usize = 64 << 20;

/// The elements that a thread blends before it writes: at most, and at least.
const BLOCK_ELEMENTS: (usize, usize) = (1 << 18, 1 << 9);

/// What a pass works on.
pub(super) struct Streaming<'a> {
    /// The averaged tensors, in the order of the file.
    tensors: Vec<Placed<'a>>,
    /// The elements before each tensor, and at last those of all.
    before: Vec<usize>,
    /// Each target's file and where its data section begins.
    files: &'a [(AtomicFile, u64)],
    options: &'a WriteOptions<'a>,
}

/// An averaged tensor, ready to be blended, and its place in the data section.
struct Placed<'a> {
    blend: TensorBlend<'a>,
    offset: usize,
    /// The size of an element of the result.
    size: usize,
}

/// A stretch of one tensor, as bytes of a block's buffer and of the data section.
struct Stretch {
    tensor: usize,
    elements: Range<usize>,
    buffer: Range<usize>,
    offset: usize,
}

impl<'a> Streaming<'a> {
    pub(super) fn new(
        pool: &'a Pool<'a>,
        selection: &'a Selection<'a>,
        layout: &'a FileLayout,
        files: &'a [(AtomicFile, u64)],
        options: &'a WriteOptions<'a>,
    ) -> Result<Self> {
        let (mut tensors, mut before) = (Vec::new(), vec![0]);
        for place in layout.places().iter().filter(|place| pool.tensors[place.index].averaged) {
            let dtype = layout.specs()[place.index].dtype;
            let size = dtype.bitsize() / 8;
            let blend = TensorBlend::new(selection, &pool.tensors[place.index], dtype)?;
            before.push(before[tensors.len()] + place.range.len() / size);
            tensors.push(Placed { blend, offset: place.range.start, size });
        }
        Ok(Streaming { tensors, before, files, options })
    }

    /// Blends and writes everything.
    pub(super) fn run(&self) -> Result<()> {
        let total = self.before[self.tensors.len()];
        let held = self.files.len() * size_of::<f64>() * rayon::current_num_threads();
        let (most, least) = BLOCK_ELEMENTS;
        let each = (BUFFERED / held).clamp(least, most);
        (0..total.div_ceil(each)).into_par_iter().try_for_each_init(
            || vec![Vec::new(); self.files.len()],
            |buffers, block| self.block(block * each..total.min((block + 1) * each), buffers),
        )
    }

    /// The stretches that a range of all averaged elements is made of.
    fn stretches(&self, elements: Range<usize>) -> Vec<Stretch> {
        let first = self.before.partition_point(|&before| before <= elements.start) - 1;
        let (mut stretches, mut filled) = (Vec::new(), 0);
        for tensor in first..self.tensors.len() {
            let Placed { offset, size, .. } = self.tensors[tensor];
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
                    offset: offset + (start - own.start) * size,
                });
                filled += bytes;
            }
        }
        stretches
    }

    fn block(&self, elements: Range<usize>, buffers: &mut [Vec<u8>]) -> Result<()> {
        let stretches = self.stretches(elements);
        let total = stretches.last().map_or(0, |last| last.buffer.end);
        buffers.iter_mut().for_each(|buffer| buffer.resize(total, 0));
        for Stretch { tensor, elements, buffer, .. } in &stretches {
            let mut dst: Vec<&mut [u8]> = buffers.iter_mut().map(|whole| &mut whole[buffer.clone()]).collect();
            let blend = &self.tensors[*tensor].blend;
            blend.stretch(&mut dst, elements.clone())?;
            self.report(blend.bytes_read(elements.len()));
        }
        // Stretches that lie side by side in the file, as they all but always do, are written together.
        let adjacent = |a: &Stretch, b: &Stretch| a.offset + a.buffer.len() == b.offset;
        for group in stretches.chunk_by(adjacent) {
            let bytes = group[0].buffer.start..group[group.len() - 1].buffer.end;
            for (buffer, (file, data)) in buffers.iter().zip(self.files) {
                file.write_at(data + group[0].offset as u64, &buffer[bytes.clone()])?;
            }
        }
        Ok(())
    }

    fn report(&self, bytes: u64) {
        if let Some(progress) = self.options.progress {
            progress(bytes);
        }
    }
}
