//! Model in parts: the same values as of a whole model, cut in many ways.

use super::*;
use crate::tensor::{MemoryMut, ParametersMut, TensorView, TensorViewMut};

/// Tensor of the whole model.
#[derive(Clone, Copy, Debug)]
pub(super) struct GlobalSpec {
    pub name: &'static str,
    pub dtype: Dtype,
    pub shape: &'static [usize],
    pub is_buffer: bool,
}

/// Odd extents, several dimensions, a scalar, integers, and a tensor without elements.
pub(super) const MODEL: &[GlobalSpec] = &[
    GlobalSpec { name: "a.weight", dtype: Dtype::F32, shape: &[7, 5], is_buffer: false },
    GlobalSpec { name: "b.weight", dtype: Dtype::BF16, shape: &[5, 3, 2, 3], is_buffer: false },
    GlobalSpec { name: "c.bias", dtype: Dtype::F32, shape: &[6], is_buffer: false },
    GlobalSpec { name: "d.weight", dtype: Dtype::F32, shape: &[3, 4], is_buffer: false },
    GlobalSpec { name: "e.scale", dtype: Dtype::F32, shape: &[], is_buffer: false },
    GlobalSpec { name: "f.count", dtype: Dtype::I64, shape: &[4], is_buffer: true },
    GlobalSpec { name: "g.none", dtype: Dtype::F32, shape: &[0, 3], is_buffer: false },
];

impl GlobalSpec {
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the bytes of one element after a step.
    fn element(&self, step: u64, i: usize) -> Vec<u8> {
        let value = ((step as usize * 7 + i * 13 + self.name.len() * 5) as f32).sin();
        match self.dtype {
            Dtype::I64 => (step * 100 + i as u64).to_le_bytes().to_vec(),
            Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        }
    }
}

/// Way to cut a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cut {
    /// The whole model on each process.
    Whole,
    /// The first dimension, in chunks of equal size but the last, as PyTorch does. Buffers and scalars are whole.
    Rows,
    /// The last dimension.
    Columns,
    /// Ranges of the flattened tensors, uneven.
    Flat,
    /// Rows in pairs of processes, each pair by columns.
    Grid,
    /// Rows among half of the processes; the others hold the same.
    Replicas,
    /// Each tensor on one process.
    Stages,
}

pub(super) const CUTS: [Cut; 6] = [Cut::Rows, Cut::Columns, Cut::Flat, Cut::Grid, Cut::Replicas, Cut::Stages];

/// Rectangle of one tensor on one process.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct HeldPart {
    pub global: usize,
    pub offset: Vec<usize>,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Returns chunk `i` of `n` of an extent, as PyTorch cuts it: offset and size.
fn chunk(extent: usize, i: usize, n: usize) -> (usize, usize) {
    let each = extent.div_ceil(n);
    let start = (each * i).min(extent);
    (start, each.min(extent - start))
}

/// Returns the place of a tensor's part on process `i` of `n`; none if the process does not have the tensor.
fn place(cut: Cut, tensor: usize, i: usize, n: usize) -> Option<(Vec<usize>, Vec<usize>)> {
    let GlobalSpec { shape, is_buffer, .. } = MODEL[tensor];
    let mut place = (vec![0; shape.len()], shape.to_vec());
    let mut split = |d: usize, i: usize, n: usize| (place.0[d], place.1[d]) = chunk(shape[d], i, n);
    if cut == Cut::Stages {
        return (tensor % n == i).then_some(place);
    }
    if is_buffer || shape.is_empty() {
        return Some(place);
    }
    match cut {
        Cut::Whole | Cut::Stages => {}
        Cut::Rows => split(0, i, n),
        Cut::Columns => split(shape.len() - 1, i, n),
        Cut::Replicas => split(0, i % n.div_ceil(2), n.div_ceil(2)),
        Cut::Grid if n.is_multiple_of(2) && shape.len() > 1 => {
            split(0, i / 2, n / 2);
            split(shape.len() - 1, i % 2, 2);
        }
        Cut::Grid => split(0, i, n),
        Cut::Flat => {
            let elements: usize = shape.iter().product();
            // Uneven, and empty on some processes.
            let edge = |i: usize| elements * i * i / (n * n);
            return Some((vec![edge(i)], vec![edge(i + 1) - edge(i)]));
        }
    }
    Some(place)
}

/// Model of one process after a step.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shard(pub Vec<HeldPart>);

impl Shard {
    pub(super) fn new(cut: Cut, i: usize, n: usize, step: u64) -> Shard {
        let held = |tensor: usize| {
            let (offset, shape) = place(cut, tensor, i, n)?;
            let mut held = HeldPart { global: tensor, offset, shape, bytes: Vec::new() };
            held.bytes = held.indices().into_iter().flat_map(|index| MODEL[tensor].element(step, index)).collect();
            Some(held)
        };
        Shard((0..MODEL.len()).filter_map(held).collect())
    }
}

impl HeldPart {
    /// Returns the index in the whole tensor of each element, in the order of this part.
    pub(super) fn indices(&self) -> Vec<usize> {
        let global = MODEL[self.global].shape;
        if self.offset.len() == 1 && global.len() != 1 {
            return (self.offset[0]..self.offset[0] + self.shape[0]).collect();
        }
        let index = |mut i: usize| {
            let (mut index, mut stride) = (0, 1);
            for d in (0..global.len()).rev() {
                index += (self.offset[d] + i % self.shape[d]) * stride;
                i /= self.shape[d];
                stride *= global[d];
            }
            index
        };
        (0..self.shape.iter().product()).map(index).collect()
    }
}

impl Parameters for Shard {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let mut views = Vec::new();
        for held in &self.0 {
            let global = &MODEL[held.global];
            let view = TensorView::host(global.name, global.dtype, &held.shape, &held.bytes)?;
            views.push(TensorView { is_buffer: global.is_buffer, ..view }.as_part_of(global.shape, &held.offset)?);
        }
        read(&views)
    }
}

impl ParametersMut for Shard {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        for held in &mut self.0 {
            let GlobalSpec { name, dtype, .. } = MODEL[held.global];
            write(TensorViewMut { name, dtype, shape: &held.shape, memory: MemoryMut::Host(&mut held.bytes) })?;
        }
        Ok(())
    }
}

/// Model of one process with another value in the first element of a tensor.
pub(super) struct Changed {
    pub shard: Shard,
    pub tensor: &'static str,
    pub value: f32,
}

impl Parameters for Changed {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let mut shard = self.shard.clone();
        let held = shard.0.iter_mut().find(|held| MODEL[held.global].name == self.tensor).unwrap();
        held.bytes[..4].copy_from_slice(&self.value.to_le_bytes());
        shard.with_tensors(read)
    }
}
