//! Blocks of a blend on devices, and those of a live model: small tensors share one.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use safetensors::Dtype;

use super::blend::{Origin, TensorBlend};
use crate::compute::cuda::{BlendPart, Blender, CudaDevice, Destination};
use crate::error::Result;
use crate::tensor::{CudaMemory, CudaMemoryMut};

/// Bytes of a block, sources and results together. Three blocks are held in the device's memory and in pinned host
/// memory.
pub(super) const BLOCK_BYTES: usize = 32 << 20;

/// Fewest elements of a block.
const MIN_BLOCK_ELEMENTS: usize = 1 << 12;

/// Most elements of a block.
const MAX_BLOCK_ELEMENTS: usize = 1 << 26;

/// Cuts elements into blocks.
pub(super) fn blocks(elements: usize, bytes_per_element: usize) -> impl Iterator<Item = Range<usize>> {
    let each = (BLOCK_BYTES / bytes_per_element.max(1)).clamp(MIN_BLOCK_ELEMENTS, MAX_BLOCK_ELEMENTS);
    (0..elements).step_by(each).map(move |start| start..elements.min(start + each))
}

/// Blenders of all devices that a synthesis uses.
#[derive(Default)]
pub(super) struct Blenders<'a>(BTreeMap<usize, Blender<'a>>);

impl<'a> Blenders<'a> {
    /// Returns the blender of a device.
    pub(super) fn on(&mut self, number: usize) -> Result<&mut Blender<'a>> {
        Ok(match self.0.entry(number) {
            Entry::Occupied(blender) => blender.into_mut(),
            Entry::Vacant(place) => place.insert(Blender::new(&CudaDevice::open(number)?)?),
        })
    }

    /// Waits for all blocks and delivers them.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.0.values_mut().try_for_each(Blender::flush)
    }
}

/// Blocks of a model that are not full yet, each for one launch.
#[derive(Default)]
pub(super) struct ModelBlocks<'a, 'm>(BTreeMap<BlockKey, ModelBlock<'a, 'm>>);

/// Facts that the tensors of a block share.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct BlockKey {
    device: usize,
    /// Stream of the model's memory.
    stream: usize,
    /// Address of the weights.
    weights: usize,
    output: Dtype,
    dtypes: Vec<Dtype>,
}

/// Parts of tensors, and their places in the model.
struct ModelBlock<'a, 'm> {
    parts: Vec<BlendPart<'a>>,
    origins: Vec<Origin<'a>>,
    weights: &'a [f64],
    places: Vec<CudaMemoryMut<'m>>,
    bytes: usize,
}

impl<'a, 'm> ModelBlocks<'a, 'm> {
    /// Adds the blend of a tensor into its memory in a model, and submits blocks that are full.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) for memory on another device or of another size, and those of
    /// [`Blender::submit`].
    pub(super) fn add(
        &mut self,
        blender: &mut Blender<'a>,
        blend: &TensorBlend<'a>,
        memory: CudaMemory<'m>,
    ) -> Result<()> {
        let device = blender.device().number();
        if memory.device != device {
            return Err(blend.error(format!(
                "it is on cuda:{}, but the averages are on cuda:{device}: keep both on one device",
                memory.device
            )));
        }
        let size = blend.size();
        if memory.bytes != blend.elements() * size {
            let expected = blend.elements() * size;
            return Err(blend.error(format!("{} bytes were given, but it takes {expected}", memory.bytes)));
        }
        let bytes_per_element = blend.bytes_read(1) as usize + size;
        for elements in blocks(blend.elements(), bytes_per_element) {
            let address = memory.address + (elements.start * size) as u64;
            let place = CudaMemoryMut(CudaMemory { address, bytes: elements.len() * size, ..memory });
            let origin = blend.origin(elements.start);
            let part = blend.on_device(elements);
            let key = BlockKey {
                device,
                stream: memory.stream,
                weights: blend.weights().as_ptr().addr(),
                output: part.output,
                dtypes: part.dtypes.clone(),
            };
            let block = self.0.entry(key.clone()).or_insert_with(|| ModelBlock::new(blend.weights()));
            block.bytes += part.elements * bytes_per_element;
            block.parts.push(part);
            block.origins.push(origin);
            block.places.push(place);
            if block.bytes >= BLOCK_BYTES
                && let Some(block) = self.0.remove(&key)
            {
                block.submit(blender)?;
            }
        }
        Ok(())
    }

    /// Submits all blocks.
    ///
    /// # Errors
    /// Those of [`Blender::submit`].
    pub(super) fn submit(self, blenders: &mut Blenders<'a>) -> Result<()> {
        self.0.into_iter().try_for_each(|(key, block)| block.submit(blenders.on(key.device)?))
    }
}

impl<'a> ModelBlock<'a, '_> {
    fn new(weights: &'a [f64]) -> Self {
        ModelBlock { parts: Vec::new(), origins: Vec::new(), weights, places: Vec::new(), bytes: 0 }
    }

    fn submit(self, blender: &mut Blender<'a>) -> Result<()> {
        let ModelBlock { parts, origins, weights, places, .. } = self;
        let report = Box::new(move |part: usize, overflow| origins[part].overflow_error(overflow));
        blender.submit(parts, weights, 1, Destination::Device(places), report)
    }
}
