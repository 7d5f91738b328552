//! Blend on a CUDA device. Sources are copied there in blocks; results are copied back, or stay there for a live model.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::blend::TensorBlend;
use super::device_blocks::{BLOCK_BYTES, Blenders, ModelBlocks, blocks};
use super::options::Progress;
use super::source_set::{ModelTensor, Selection, SourceSet};
use crate::compute::cuda::{Blender, CudaDevice, Destination};
use crate::error::Result;
use crate::tensor::{MemoryMut, ParametersMut, Tensor, TensorViewMut, Tensors, byte_size};

/// Tensor and a range of its elements.
pub(super) type Part<'a> = (&'a TensorBlend<'a>, Range<usize>);

/// Queues the blend of parts of tensors as one block. All parts have the same weights.
pub(super) fn submit<'a>(
    blender: &mut Blender<'a>,
    parts: &[Part<'a>],
    targets: usize,
    destination: Destination<'a, '_>,
) -> Result<()> {
    let inputs = parts.iter().map(|(blend, elements)| blend.on_device(elements.clone())).collect();
    let origins: Vec<_> = parts.iter().map(|(blend, elements)| blend.origin(elements.start)).collect();
    let weights = parts.first().map_or(&[][..], |(blend, _)| blend.weights());
    let report = Box::new(move |part: usize, overflow| origins[part].overflow_error(overflow));
    blender.submit(inputs, weights, targets, destination, report)
}

impl SourceSet<'_> {
    /// Blends a plan into new host memory on the devices of the sources. Tensors whose sources are all on the host are
    /// blended on `device`. Tied tensors are left to the caller.
    pub(super) fn load_on(&self, device: &Arc<CudaDevice>, selection: &Selection<'_>) -> Result<Tensors> {
        let averaged: Vec<&ModelTensor> = self.averaged().collect();
        let mut blends = Vec::with_capacity(averaged.len());
        for tensor in &averaged {
            blends.push(TensorBlend::new(selection.of(&tensor.name), tensor, tensor.dtype)?);
        }
        let mut results = Vec::with_capacity(averaged.len());
        for tensor in &averaged {
            results.push(vec![0u8; byte_size(&tensor.name, tensor.dtype, &tensor.shape)?]);
        }
        let places = results.iter_mut().map(Vec::as_mut_slice).collect();
        blend_by_device(device, &blends, places, None)?;
        let mut tensors = Tensors::default();
        for (tensor, bytes) in averaged.into_iter().zip(results) {
            tensors.insert(&*tensor.name, Tensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes });
        }
        for tensor in self.copied() {
            let bytes = selection.copied(0, tensor)?.to_bytes().into_owned();
            tensors.insert(&*tensor.name, Tensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes });
        }
        Ok(tensors)
    }

    /// Blends a single target into a model, each tensor on its device, or on that of its average. After an error the
    /// caller has to restore the tensors that were written.
    pub(super) fn blend_into_on(
        &self,
        selection: &Selection<'_>,
        params: &mut (impl ParametersMut + ?Sized),
    ) -> Result<()> {
        let mut blenders = Blenders::default();
        params.for_each_batch_mut(&mut |mut views: Vec<TensorViewMut<'_>>| {
            // In the order of the averages, in which neighbours are copied at once.
            views.sort_by(|a, b| a.name.cmp(b.name));
            let mut blocks = ModelBlocks::default();
            for view in views {
                let Some(tensor) = self.find_averaged(view.name) else { continue };
                let blend = TensorBlend::new(selection.of(&tensor.name), tensor, view.dtype)?;
                match (view.memory, blend.device()) {
                    (MemoryMut::Cuda(memory), average) => {
                        blocks.add(blenders.on(average.unwrap_or(memory.0.device))?, &blend, memory.0)?;
                    }
                    (MemoryMut::Host(bytes), Some(number)) => into_host(blenders.on(number)?, &blend, bytes)?,
                    (MemoryMut::Host(bytes), None) => blend.blend_all(bytes)?,
                }
            }
            blocks.submit(&mut blenders)
        })?;
        blenders.flush()
    }
}

/// Blends all tensors into host memory, each on the device of its average. Those whose sources are all on the host are
/// blended on `device`.
pub(super) fn blend_by_device<'a>(
    device: &Arc<CudaDevice>,
    blends: &'a [TensorBlend<'a>],
    results: Vec<&'a mut [u8]>,
    progress: Progress<'a>,
) -> Result<()> {
    let mut by_device: BTreeMap<usize, (Vec<&TensorBlend<'_>>, Vec<&mut [u8]>)> = BTreeMap::new();
    for (blend, result) in blends.iter().zip(results) {
        let (blends, results) = by_device.entry(blend.device().unwrap_or(device.number())).or_default();
        blends.push(blend);
        results.push(result);
    }
    for (number, (blends, results)) in by_device {
        blend_in_blocks(&CudaDevice::open(number)?, &blends, results, progress)?;
    }
    Ok(())
}

/// Blends tensors into host memory on one device. Small tensors share a block.
fn blend_in_blocks<'a>(
    device: &Arc<CudaDevice>,
    blends: &[&'a TensorBlend<'a>],
    results: Vec<&'a mut [u8]>,
    progress: Progress<'a>,
) -> Result<()> {
    let mut blender = Blender::new(device)?;
    let mut parts = Vec::new();
    let mut places = Vec::new();
    let mut bytes = 0;
    for (&blend, mut rest) in blends.iter().zip(results) {
        if parts.first().is_some_and(|(first, _): &Part<'_>| !first.has_weights_of(blend)) {
            deliver_into(&mut blender, &parts, std::mem::take(&mut places), progress)?;
            parts.clear();
            bytes = 0;
        }
        let size = blend.size();
        let bytes_per_element = blend.bytes_read(1) as usize + size;
        for elements in blocks(rest.len() / size, bytes_per_element) {
            let (place, tail) = rest.split_at_mut(elements.len() * size);
            rest = tail;
            bytes += elements.len() * bytes_per_element;
            parts.push((blend, elements));
            places.push(place);
            if bytes >= BLOCK_BYTES {
                deliver_into(&mut blender, &parts, std::mem::take(&mut places), progress)?;
                parts.clear();
                bytes = 0;
            }
        }
    }
    deliver_into(&mut blender, &parts, places, progress)?;
    blender.flush()
}

/// Blends a tensor into host memory on the device that holds some of the sources.
pub(super) fn into_host<'a>(blender: &mut Blender<'a>, blend: &TensorBlend<'a>, bytes: &mut [u8]) -> Result<()> {
    let size = blend.size();
    let arrived = Rc::new(RefCell::new(Vec::with_capacity(bytes.len())));
    for elements in blocks(bytes.len() / size, blend.bytes_read(1) as usize + size) {
        let origin = blend.origin(elements.start);
        let report = Box::new(move |_, overflow| origin.overflow_error(overflow));
        // Blocks are delivered in the order of submission.
        let arrived = arrived.clone();
        let deliver = move |results: &[&[u8]]| {
            arrived.borrow_mut().extend_from_slice(results.first().copied().unwrap_or_default());
            Ok(())
        };
        let destination = Destination::Host(Box::new(deliver));
        blender.submit(vec![blend.on_device(elements)], blend.weights(), 1, destination, report)?;
    }
    blender.flush()?;
    bytes.copy_from_slice(&arrived.borrow());
    Ok(())
}

/// Queues a block whose results are copied to these places, one for each part.
fn deliver_into<'a>(
    blender: &mut Blender<'a>,
    parts: &[Part<'a>],
    places: Vec<&'a mut [u8]>,
    progress: Progress<'a>,
) -> Result<()> {
    if parts.is_empty() {
        return Ok(());
    }
    let read = parts.iter().map(|(blend, elements)| blend.bytes_read(elements.len())).sum();
    let deliver = move |results: &[&[u8]]| {
        let mut rest = results.first().copied().unwrap_or_default();
        for place in places {
            let (head, tail) = rest.split_at(place.len());
            place.copy_from_slice(head);
            rest = tail;
        }
        progress.inspect(|progress| progress(read));
        Ok(())
    };
    submit(blender, parts, 1, Destination::Host(Box::new(deliver)))
}
