//! Fingerprints of the first values of tensors, so that replicas can be compared.

#[cfg(feature = "cuda")]
use std::collections::BTreeMap;

#[cfg(feature = "cuda")]
use crate::compute::cuda::{CudaDevice, Staging};
#[cfg(not(feature = "cuda"))]
use crate::error::Error;
use crate::error::Result;
use crate::tensor::{Memory, TensorView};

/// Largest number of bytes of a tensor that are read.
const BYTES: usize = 4096;

/// Number of hexadecimal digits of a fingerprint.
const DIGITS: usize = 16;

/// Reader of the first values of tensors in any memory.
#[derive(Default)]
pub(super) struct Fingerprints {
    /// Pinned buffers of each device.
    #[cfg(feature = "cuda")]
    staging: BTreeMap<usize, Staging>,
}

impl Fingerprints {
    /// Returns a hash of the first values of a tensor.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda) if a device fails.
    pub(super) fn of(&mut self, view: &TensorView<'_>) -> Result<String> {
        let hash = match view.memory {
            Memory::Host(bytes) => blake3::hash(&bytes[..bytes.len().min(BYTES)]),
            #[cfg(feature = "cuda")]
            Memory::Cuda(mut memory) => {
                memory.bytes = memory.bytes.min(BYTES);
                blake3::hash(&self.staging(memory.device)?.read(&memory)?)
            }
            #[cfg(not(feature = "cuda"))]
            Memory::Cuda(_) => return Err(Error::on_device(view.name)),
        };
        Ok(hash.to_hex()[..DIGITS].to_owned())
    }

    #[cfg(feature = "cuda")]
    fn staging(&mut self, device: usize) -> Result<&mut Staging> {
        use std::collections::btree_map::Entry;
        Ok(match self.staging.entry(device) {
            Entry::Occupied(staging) => staging.into_mut(),
            Entry::Vacant(place) => place.insert(Staging::new(&CudaDevice::open(device)?, usize::MAX)?),
        })
    }
}
