//! Synthesis into new memory.

use rayon::prelude::*;

use super::backend::Backend;
use super::blend::TensorBlend;
use super::source_set::{ModelTensor, Selection, SourceSet};
use crate::compute::cpu;
use crate::device::Device;
use crate::error::Result;
use crate::planning::Plan;
use crate::tensor::{Tensor, Tensors, byte_size};

impl SourceSet<'_> {
    /// Blends a plan into new memory.
    ///
    /// # Errors
    /// Those of [`SourceSet::select`] and [`SourceSet::load_selection`].
    pub(crate) fn load(&self, plan: &Plan) -> Result<Tensors> {
        self.load_selection(&self.select(&[plan])?)
    }

    /// Blends the only target of a selection into new memory.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if a tensor is missing or a sum does not fit its dtype, and
    /// [`Error::Cuda`](crate::Error::Cuda).
    pub(crate) fn load_selection(&self, selection: &Selection<'_>) -> Result<Tensors> {
        let mut tensors = match Backend::open(self.device(Device::Cpu))? {
            Backend::Cpu => self.load_cpu(selection)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => self.load_on(&device, selection)?,
        };
        for (dropped, kept) in &self.tied {
            if let Some(tensor) = tensors.get(kept).cloned() {
                tensors.insert(dropped.clone(), tensor);
            }
        }
        Ok(tensors)
    }

    fn load_cpu(&self, selection: &Selection<'_>) -> Result<Tensors> {
        let loaded = self.tensors.par_iter().map(|tensor| Ok((tensor.name.clone(), load_tensor(selection, tensor)?)));
        Ok(loaded.collect::<Result<Vec<_>>>()?.into_iter().collect())
    }
}

/// Blends or copies one tensor into new memory.
fn load_tensor(selection: &Selection<'_>, tensor: &ModelTensor) -> Result<Tensor> {
    let mut bytes = cpu::zeros(byte_size(&tensor.name, tensor.dtype, &tensor.shape)?);
    if tensor.averaged {
        TensorBlend::new(selection, tensor, tensor.dtype)?.blend_all(&mut bytes)?;
    } else {
        bytes.copy_from_slice(&selection.copied(0, tensor)?.to_bytes());
    }
    Ok(Tensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes })
}
