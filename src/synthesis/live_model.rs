//! Synthesis into a live model.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::backend::Backend;
use super::blend::TensorBlend;
use super::source_set::{ModelTensor, Selection, SourceSet};
use crate::device::Device;
use crate::error::{Difference, Error, Result};
use crate::planning::Plan;
use crate::tensor::{Memory, ParametersMut, TensorViewMut, is_averaged};

impl SourceSet<'_> {
    /// Blends a plan into a live model, in the model's own dtypes. Tensors that are not averaged stay as they are.
    ///
    /// In host memory, everything that can fail is tried before the first byte is written. On a device that would take
    /// another pass over the bus, so the originals are kept until the blend succeeded, and restored if it fails.
    pub(crate) fn write_into(&self, plan: &Plan, params: &mut (impl ParametersMut + ?Sized)) -> Result<()> {
        let selection = self.select(&[plan])?;
        match self.backend_of(params)? {
            Backend::Cpu => {
                self.check_model(&selection, params, true)?;
                self.blend_into(&selection, params)
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => {
                self.swap(plan, params, |_| false)?.keep();
                Ok(())
            }
        }
    }

    /// Opens the device that blends into a model: the sources' device, or else the model's.
    pub(super) fn backend_of(&self, params: &(impl ParametersMut + ?Sized)) -> Result<Backend> {
        let mut device = Device::Cpu;
        params.with_tensors(&mut |views| {
            for view in views {
                let Memory::Cuda(memory) = view.memory else { continue };
                if cfg!(not(feature = "cuda")) {
                    return Err(Error::on_device(view.name));
                }
                device = Device::Cuda(memory.device);
            }
            Ok(())
        })?;
        Backend::open(self.device(device))
    }

    /// Checks that a model has all averaged tensors, in their shapes. With `check_sums`, every sum of the single target
    /// is checked to fit its dtype, too.
    ///
    /// # Errors
    /// [`Error::Changed`] if the model differs from the run, and [`Error::Tensor`] if a sum does not fit.
    pub(super) fn check_model(
        &self,
        selection: &Selection<'_>,
        params: &(impl ParametersMut + ?Sized),
        check_sums: bool,
    ) -> Result<()> {
        params.with_tensors(&mut |views| {
            for view in views {
                if let Some(tensor) = self.find_averaged(view.name) {
                    check_target(tensor, view.dtype, view.shape)?;
                    let blend = TensorBlend::new(selection.of(&tensor.name), tensor, view.dtype)?;
                    if check_sums {
                        blend.check(view.elements())?;
                    }
                }
            }
            self.check_complete(&views.iter().map(|view| view.name).collect())
        })
    }

    /// Blends a single target into a model in host memory, after [`SourceSet::check_model`].
    pub(super) fn blend_into(
        &self,
        selection: &Selection<'_>,
        params: &mut (impl ParametersMut + ?Sized),
    ) -> Result<()> {
        params.for_each_mut(&mut |view: TensorViewMut<'_>| {
            let Some(tensor) = self.find_averaged(view.name) else { return Ok(()) };
            let blend = TensorBlend::new(selection.of(&tensor.name), tensor, view.dtype)?;
            let bytes = view.into_host_bytes().ok_or_else(|| Error::on_device(&tensor.name))?;
            blend.blend_all(bytes)
        })
    }

    fn check_complete(&self, given: &BTreeSet<&str>) -> Result<()> {
        match self.averaged().find(|tensor| !given.contains(tensor.name.as_str())) {
            Some(missing) => {
                Err(Error::changed(&missing.name, Difference::new("the tensor", "present in the run", "missing")))
            }
            None => Ok(()),
        }
    }
}

/// Checks that a model's tensor can take an average.
fn check_target(tensor: &ModelTensor, dtype: Dtype, shape: &[usize]) -> Result<()> {
    if shape != tensor.shape {
        let stored = format!("{:?} in the run", tensor.shape);
        return Err(Error::changed(&tensor.name, Difference::new("its shape", stored, format!("{shape:?}"))));
    }
    if !is_averaged(dtype) {
        let stored = format!("{} in the run", tensor.dtype);
        return Err(Error::changed(&tensor.name, Difference::new("its dtype", stored, dtype)));
    }
    Ok(())
}
