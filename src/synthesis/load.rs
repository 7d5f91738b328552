//! Synthesis into new memory.

use rayon::prelude::*;

use super::backend::Backend;
use super::blend::TensorBlend;
use super::source_set::{ModelTensor, Selection, SourceSet, WeightedSources};
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
        let stored = self.tensors.par_iter().filter(|tensor| !selection.is_computed(&tensor.name));
        let load = |tensor: &ModelTensor| match tensor.averaged {
            true => blend(selection.of(&tensor.name), tensor),
            false => copy(selection, tensor),
        };
        let loaded = stored.map(|tensor| Ok((tensor.name.clone(), load(tensor)?)));
        let mut tensors: Tensors = loaded.collect::<Result<Vec<_>>>()?.into_iter().collect();
        selection.for_each_group(|group| {
            for tensor in group.tensors.iter().filter_map(|name| self.find_kept(name)) {
                tensors.insert(tensor.name.clone(), blend(&group.weighted, tensor)?);
            }
            Ok(())
        })?;
        Ok(tensors)
    }
}

/// Blends one tensor into new memory.
fn blend(sources: &WeightedSources<'_>, tensor: &ModelTensor) -> Result<Tensor> {
    let mut bytes = cpu::zeros(byte_size(&tensor.name, tensor.dtype, &tensor.shape)?);
    TensorBlend::new(sources, tensor, tensor.dtype)?.blend_all(&mut bytes)?;
    Ok(Tensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes })
}

/// Copies one tensor into new memory.
fn copy(selection: &Selection<'_>, tensor: &ModelTensor) -> Result<Tensor> {
    let mut bytes = cpu::zeros(byte_size(&tensor.name, tensor.dtype, &tensor.shape)?);
    bytes.copy_from_slice(&selection.copied(0, tensor)?.to_bytes());
    Ok(Tensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes })
}
