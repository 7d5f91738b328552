//! Copies of an update's parameters to the host, from every place that holds some.

use std::sync::Arc;

use super::places::{PlacedTensors, device_of, group_by_place, place_name};
use crate::compute::cuda::{CudaDevice, Fence, HostCopy, Offload, PendingCopy};
use crate::error::{Error, Result};
use crate::tensor::{CudaMemory, Memory, TensorView};

/// Copier of a model's parameters. Each device copies its own on a stream of its own; those in host memory are copied
/// by the call.
pub(super) struct Gathering {
    devices: Vec<DeviceCopier>,
    /// Tensors in host memory.
    host: Vec<usize>,
    places: Arc<[TensorCopy]>,
}

/// Function that prepares the copies of a device's tensors: their indices in the model, and their sizes in bytes.
pub(super) type Prepare<'a> = dyn Fn(&Arc<CudaDevice>, &[usize], &[usize]) -> Result<Offload> + 'a;

/// Copier of the parameters of one device.
struct DeviceCopier {
    offload: Offload,
    /// Number of the device.
    number: usize,
    /// Tensors on the device, by their indices in the model.
    tensors: Vec<usize>,
}

/// Copy that holds a tensor, and the tensor's index there.
#[derive(Clone, Copy)]
enum TensorCopy {
    /// Copy of the device of this index.
    Device(usize, usize),
    Host(usize),
}

/// Copies that have not arrived yet.
pub(super) struct PendingCopies {
    devices: Vec<PendingCopy>,
    host: Vec<Vec<u8>>,
    places: Arc<[TensorCopy]>,
}

/// Copies that have arrived on the host.
pub(super) struct ArrivedCopies {
    devices: Vec<HostCopy>,
    host: Vec<Vec<u8>>,
    places: Arc<[TensorCopy]>,
}

impl Gathering {
    /// Prepares to copy tensors of these sizes in bytes from these places: numbers of CUDA devices, none for the host.
    /// `prepare` prepares the copies of one device.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the driver or the system rejects it.
    pub(super) fn new(places: &[Option<usize>], sizes: &[usize], prepare: &Prepare<'_>) -> Result<Gathering> {
        let mut gathering = Gathering { devices: Vec::new(), host: Vec::new(), places: Arc::default() };
        let mut copies = vec![TensorCopy::Host(0); places.len()];
        for PlacedTensors { place, averaged: tensors, .. } in group_by_place(places, places.len()) {
            let index = gathering.devices.len();
            for (at, &tensor) in tensors.iter().enumerate() {
                copies[tensor] = if place.is_some() { TensorCopy::Device(index, at) } else { TensorCopy::Host(at) };
            }
            match place {
                None => gathering.host = tensors,
                Some(number) => {
                    let sizes: Vec<usize> = tensors.iter().map(|&tensor| sizes[tensor]).collect();
                    let offload = prepare(&CudaDevice::open(number)?, &tensors, &sizes)?;
                    gathering.devices.push(DeviceCopier { offload, number, tensors });
                }
            }
        }
        gathering.places = copies.into();
        Ok(gathering)
    }

    /// Iterates over the copiers of the devices.
    pub(super) fn offloads(&self) -> impl Iterator<Item = &Offload> {
        self.devices.iter().map(|copier| &copier.offload)
    }

    /// Queues a copy of all tensors, in the order of the sizes given to [`Gathering::new`].
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor that has moved, and [`Error::Cuda`].
    pub(super) fn copy(&mut self, views: &[&TensorView<'_>]) -> Result<(PendingCopies, Fence)> {
        let mut memory = Vec::with_capacity(self.devices.len());
        for copier in &self.devices {
            let tensors = copier.tensors.iter().map(|&tensor| views[tensor]);
            memory.push(tensors.map(|view| memory_on(view, copier.number)).collect::<Result<Vec<_>>>()?);
        }
        let host = self.host.iter().map(|&tensor| host_bytes(views[tensor]).map(<[u8]>::to_vec));
        let host = host.collect::<Result<Vec<_>>>()?;
        let mut pending = Vec::with_capacity(self.devices.len());
        let mut fences = Vec::with_capacity(self.devices.len());
        for (copier, memory) in self.devices.iter_mut().zip(&memory) {
            match copier.offload.copy(memory) {
                Ok((copy, fence)) => {
                    pending.push(copy);
                    fences.push(fence);
                }
                Err(error) => {
                    // The caller gets no fence for the copies of the other devices.
                    pending.into_iter().for_each(|copy: PendingCopy| drop(copy.wait()));
                    return Err(error);
                }
            }
        }
        Ok((PendingCopies { devices: pending, host, places: self.places.clone() }, Fence::of_all(fences)))
    }
}

/// Returns the memory of a tensor that is on a device.
///
/// # Errors
/// [`Error::Tensor`] if it is elsewhere.
pub(super) fn memory_on<'a>(view: &TensorView<'a>, number: usize) -> Result<CudaMemory<'a>> {
    match view.memory {
        Memory::Cuda(memory) if memory.device == number => Ok(memory),
        _ => Err(moved(view, Some(number))),
    }
}

/// Returns the bytes of a tensor in host memory.
///
/// # Errors
/// [`Error::Tensor`] if it is elsewhere.
pub(super) fn host_bytes<'a>(view: &TensorView<'a>) -> Result<&'a [u8]> {
    view.host_bytes().ok_or_else(|| moved(view, None))
}

fn moved(view: &TensorView<'_>, before: Option<usize>) -> Error {
    let (now, before) = (place_name(device_of(view)), place_name(before));
    let reason = format!("it is {now} now, and was {before} when the run was opened: move it back, or resume the run");
    Error::tensor(view.name, reason)
}

impl PendingCopies {
    /// Waits until all copies have arrived.
    ///
    /// # Errors
    /// [`Error::Cuda`] if one failed.
    pub(super) fn wait(self) -> Result<ArrivedCopies> {
        let devices = self.devices.into_iter().map(PendingCopy::wait).collect::<Result<_>>()?;
        Ok(ArrivedCopies { devices, host: self.host, places: self.places })
    }
}

impl ArrivedCopies {
    /// Returns the bytes of tensor `i`.
    pub(super) fn tensor(&self, i: usize) -> &[u8] {
        match self.places[i] {
            TensorCopy::Device(device, at) => self.devices[device].tensor(at),
            TensorCopy::Host(at) => &self.host[at],
        }
    }
}
