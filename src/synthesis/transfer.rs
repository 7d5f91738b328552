//! Copies of a model's tensors, between host memory and any device. Those of a device share blocks.

use std::borrow::Cow;
#[cfg(feature = "cuda")]
use std::collections::BTreeMap;

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::compute::cuda::{CudaDevice, Staging};
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::tensor::{CudaMemory, CudaMemoryMut};
use crate::tensor::{Memory, MemoryMut, Tensor, TensorView, TensorViewMut};

/// Memory of a device, and the bytes to write there.
#[cfg(feature = "cuda")]
type DeviceWrite<'w> = (CudaMemoryMut<'w>, &'w [u8]);

/// Copier between host memory and a model's memory on any device.
#[derive(Default)]
pub(super) struct Transfer {
    /// Pinned buffers of each device.
    #[cfg(feature = "cuda")]
    staging: BTreeMap<usize, Staging>,
}

impl Transfer {
    /// Copies tensors to host memory: all threads copy those in host memory.
    ///
    /// # Errors
    /// [`Error::Cuda`] if a device fails.
    pub(super) fn read_all(&mut self, views: &[&TensorView<'_>]) -> Result<Vec<Tensor>> {
        let copy = |view: &&TensorView<'_>| view.host_bytes().map(<[u8]>::to_vec).unwrap_or_default();
        let bytes: Vec<Vec<u8>> = views.par_iter().map(copy).collect();
        let tensor = |(view, bytes): (&&TensorView<'_>, Vec<u8>)| Tensor {
            dtype: view.dtype,
            shape: view.shape.to_vec(),
            bytes,
        };
        let mut tensors: Vec<Tensor> = views.iter().zip(bytes).map(tensor).collect();
        self.read_devices(views, &mut tensors)?;
        Ok(tensors)
    }

    /// Copies the tensors that are on devices.
    #[cfg(feature = "cuda")]
    fn read_devices(&mut self, views: &[&TensorView<'_>], tensors: &mut [Tensor]) -> Result<()> {
        let mut by_stream: BTreeMap<(usize, usize), (Vec<usize>, Vec<CudaMemory<'_>>)> = BTreeMap::new();
        for (i, view) in views.iter().enumerate() {
            let Memory::Cuda(memory) = view.memory else { continue };
            let (indices, memories) = by_stream.entry((memory.device, memory.stream)).or_default();
            indices.push(i);
            memories.push(memory);
        }
        for ((device, _), (indices, memories)) in by_stream {
            let copies = self.staging(device)?.read_all(&memories)?;
            indices.into_iter().zip(copies).for_each(|(i, bytes)| tensors[i].bytes = bytes);
        }
        Ok(())
    }

    /// Refuses tensors that are on devices.
    #[cfg(not(feature = "cuda"))]
    fn read_devices(&mut self, views: &[&TensorView<'_>], _: &mut [Tensor]) -> Result<()> {
        match views.iter().find(|view| matches!(view.memory, Memory::Cuda(_))) {
            Some(view) => Err(Error::on_device(view.name)),
            None => Ok(()),
        }
    }

    /// Writes bytes to tensors, all that can be written.
    ///
    /// # Errors
    /// The first of these: [`Error::Tensor`] for a tensor of another size, [`Error::Cuda`] if a device fails.
    pub(super) fn write_all(&mut self, writes: Vec<(TensorViewMut<'_>, Cow<'_, [u8]>)>) -> Result<()> {
        let mut outcome = Ok(());
        #[cfg(feature = "cuda")]
        let mut by_stream: BTreeMap<(usize, usize), Vec<DeviceWrite<'_>>> = BTreeMap::new();
        let (views, bytes): (Vec<_>, Vec<_>) = writes.into_iter().unzip();
        for (view, bytes) in views.into_iter().zip(&bytes) {
            match view.memory {
                MemoryMut::Host(dst) if dst.len() == bytes.len() => dst.copy_from_slice(bytes),
                #[cfg(feature = "cuda")]
                MemoryMut::Cuda(memory) if memory.0.bytes == bytes.len() => {
                    by_stream.entry((memory.0.device, memory.0.stream)).or_default().push((memory, &**bytes));
                }
                memory => outcome = outcome.and(Err(not_written(view.name, &memory, bytes.len()))),
            }
        }
        #[cfg(feature = "cuda")]
        for ((device, _), writes) in by_stream {
            outcome = outcome.and(self.staging(device).and_then(|staging| staging.write_all(&writes)));
        }
        outcome
    }

    /// Returns the pinned buffers for copies from and to a device.
    #[cfg(feature = "cuda")]
    fn staging(&mut self, device: usize) -> Result<&mut Staging> {
        use std::collections::btree_map::Entry;
        Ok(match self.staging.entry(device) {
            Entry::Occupied(staging) => staging.into_mut(),
            Entry::Vacant(place) => place.insert(Staging::new(&CudaDevice::open(device)?, usize::MAX)?),
        })
    }
}

/// Error for memory of another size, or on a device in a build without CUDA.
fn not_written(name: &str, memory: &MemoryMut<'_>, expected: usize) -> Error {
    let length = match memory {
        MemoryMut::Host(dst) => dst.len(),
        #[cfg(not(feature = "cuda"))]
        MemoryMut::Cuda(_) => return Error::on_device(name),
        #[cfg(feature = "cuda")]
        MemoryMut::Cuda(memory) => memory.0.bytes,
    };
    let why = format!("it has {length} bytes now, and had {expected}");
    Error::tensor(name, format!("{why}: its weights cannot be restored; load the model's own checkpoint"))
}
