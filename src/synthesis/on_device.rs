//! Blending on a CUDA device: the sources travel there in blocks, and the results come back or stay.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::blend::TensorBlend;
use super::output::copied;
use super::source_set::{ModelTensor, Selection, SourceSet};
use crate::compute::cuda::{Blender, CudaDevice, Destination};
use crate::error::Result;
use crate::tensor::{CudaMemory, CudaMemoryMut, MemoryMut, ParametersMut, Tensor, TensorViewMut, Tensors, byte_size};

/// Bytes of a block, sources and results together. Twice as much is taken of the device's memory and locked of the host's.
const BLOCK: usize = 64 << 20;

/// The elements of a block, at least and at most.
const ELEMENTS: (usize, usize) = (1 << 12, 1 << 26);

/// A tensor and a range of its elements.
pub(super) type Part<'a> = (&'a TensorBlend<'a>, Range<usize>);

/// Cuts elements into blocks.
pub(super) fn blocks(elements: usize, bytes_per_element: usize) -> impl Iterator<Item = Range<usize>> {
    let (least, most) = ELEMENTS;
    let each = (BLOCK / bytes_per_element.max(1)).clamp(least, most);
    (0..elements).step_by(each).map(move |start| start..elements.min(start + each))
}

/// Queues the blend of parts of tensors, all of one selection.
pub(super) fn submit<'a>(
    blender: &mut Blender<'a>,
    parts: &[Part<'a>],
    targets: usize,
    destination: Destination<'a, '_>,
) -> Result<()> {
    let stretches = parts.iter().map(|(blend, elements)| blend.on_device(elements.clone())).collect();
    let origins: Vec<_> = parts.iter().map(|(blend, elements)| blend.origin(elements.start)).collect();
    let weights = parts.first().map_or(&[][..], |(blend, _)| blend.weights());
    let report = Box::new(move |stretch: usize, unfit| origins[stretch].unfit(unfit));
    blender.submit(stretches, weights, targets, destination, report)
}

impl SourceSet<'_> {
    /// Blends a plan into memory of its own, by way of a device. Tied tensors are left to the caller.
    pub(super) fn load_on(&self, device: &Arc<CudaDevice>, selection: &Selection<'_>) -> Result<Tensors> {
        let averaged: Vec<&ModelTensor> = self.tensors.iter().filter(|tensor| tensor.averaged).collect();
        let mut blends = Vec::with_capacity(averaged.len());
        for tensor in &averaged {
            blends.push(TensorBlend::new(selection, tensor, tensor.dtype)?);
        }
        let size = |tensor: &&ModelTensor| byte_size(&tensor.name, tensor.dtype, &tensor.shape).map(|n| vec![0u8; n]);
        let mut results: Vec<Vec<u8>> = averaged.iter().map(size).collect::<Result<_>>()?;
        let mut blender = Blender::new(device)?;
        // Small tensors share a block.
        let (mut parts, mut places, mut held) = (Vec::new(), Vec::new(), 0);
        for (blend, bytes) in blends.iter().zip(&mut results) {
            let (size, each) = (blend.output().bitsize() / 8, blend.bytes_read(1) as usize);
            let mut rest = bytes.as_mut_slice();
            for elements in blocks(rest.len() / size, each + size) {
                let (own, tail) = rest.split_at_mut(elements.len() * size);
                rest = tail;
                held += elements.len() * (each + size);
                parts.push((blend, elements));
                places.push(own);
                if held >= BLOCK {
                    deliver_into(&mut blender, &parts, std::mem::take(&mut places))?;
                    parts.clear();
                    held = 0;
                }
            }
        }
        deliver_into(&mut blender, &parts, places)?;
        blender.flush()?;
        drop(blender);
        let mut tensors = Tensors::default();
        for (tensor, bytes) in averaged.into_iter().zip(results) {
            tensors.insert(&*tensor.name, Tensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes });
        }
        for tensor in self.tensors.iter().filter(|tensor| !tensor.averaged) {
            let bytes = copied(selection, 0, tensor)?.to_vec();
            tensors.insert(&*tensor.name, Tensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes });
        }
        Ok(tensors)
    }

    /// Blends a single target into a model, on the device where the model or a source lies. What was written before an
    /// error is the caller's to restore.
    pub(super) fn blend_into_on(
        &self,
        device: &Arc<CudaDevice>,
        selection: &Selection<'_>,
        params: &mut (impl ParametersMut + ?Sized),
    ) -> Result<()> {
        let mut blender = Blender::new(device)?;
        params.for_each_mut(&mut |view: TensorViewMut<'_>| {
            let Some(tensor) = self.averaged(view.name) else { return Ok(()) };
            let blend = TensorBlend::new(selection, tensor, view.dtype)?;
            match view.memory {
                MemoryMut::Cuda(memory) => into_device(&mut blender, &blend, memory.0),
                MemoryMut::Host(bytes) => into_host(&mut blender, &blend, bytes),
            }
        })?;
        blender.flush()
    }
}

/// Blends a tensor into its place in a model on the device.
fn into_device<'a>(blender: &mut Blender<'a>, blend: &TensorBlend<'a>, memory: CudaMemory<'_>) -> Result<()> {
    if memory.device != blender.device().number() {
        let (there, here) = (memory.device, blender.device().number());
        return Err(
            blend.error(format!("it lies on cuda:{there}, the averages on cuda:{here}: keep both on one device"))
        );
    }
    let size = blend.output().bitsize() / 8;
    if memory.bytes != blend.elements() * size {
        return Err(blend.error(format!("{} bytes are lent, it has {} elements", memory.bytes, blend.elements())));
    }
    for elements in blocks(blend.elements(), blend.bytes_read(1) as usize + size) {
        let (start, bytes) = (elements.start * size, elements.len() * size);
        let place = CudaMemoryMut(CudaMemory { address: memory.address + start as u64, bytes, ..memory });
        let origin = blend.origin(elements.start);
        let report = Box::new(move |_, unfit| origin.unfit(unfit));
        let destination = Destination::Device(vec![place]);
        blender.submit(vec![blend.on_device(elements)], blend.weights(), 1, destination, report)?;
    }
    Ok(())
}

/// Blends a tensor of a model in host memory, of sources of which some lie on a device.
pub(super) fn into_host<'a>(blender: &mut Blender<'a>, blend: &TensorBlend<'a>, bytes: &mut [u8]) -> Result<()> {
    let size = blend.output().bitsize() / 8;
    let arrived = Rc::new(RefCell::new(Vec::with_capacity(bytes.len())));
    for elements in blocks(bytes.len() / size, blend.bytes_read(1) as usize + size) {
        let origin = blend.origin(elements.start);
        let report = Box::new(move |_, unfit| origin.unfit(unfit));
        // Blocks are delivered in their order.
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

/// Queues a block whose results go to these places, one for each part.
fn deliver_into<'a>(blender: &mut Blender<'a>, parts: &[Part<'a>], places: Vec<&'a mut [u8]>) -> Result<()> {
    if parts.is_empty() {
        return Ok(());
    }
    let deliver = move |results: &[&[u8]]| {
        let mut rest = results.first().copied().unwrap_or_default();
        for place in places {
            let (own, tail) = rest.split_at(place.len());
            place.copy_from_slice(own);
            rest = tail;
        }
        Ok(())
    };
    submit(blender, parts, 1, Destination::Host(Box::new(deliver)))
}
