//! Sources of a blend: snapshots on disk and live averages behind one interface.

use std::collections::BTreeMap;

use safetensors::Dtype;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::planning::{IndexedSource, Plan, Weight};
use crate::snapshot::Snapshot;
use crate::tensor::TensorSpec;

/// Elements of a stored tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Elements<'a> {
    /// Bytes in host memory, mapped files included.
    Host(&'a [u8]),
    /// Memory of the source's device.
    #[cfg(feature = "cuda")]
    Device(crate::compute::cuda::BlendInput<'a>),
}

impl<'a> Elements<'a> {
    /// Returns the bytes in host memory. Returns `None` for elements on a device.
    pub(crate) fn host(self) -> Option<&'a [u8]> {
        match self {
            Elements::Host(bytes) => Some(bytes),
            #[cfg(feature = "cuda")]
            Elements::Device(_) => None,
        }
    }
}

/// Holder of the tensors of one average.
pub(crate) trait TensorSource: Sync {
    /// Returns a tensor's stored dtype and elements.
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)>;

    /// As [`TensorSource::stored`], with a hint: `place` is the tensor's position, by name, in another source. Most
    /// sources have it at the same position. `place` becomes the position in this one.
    fn stored_near(&self, name: &str, place: &mut usize) -> Option<(Dtype, Elements<'_>)> {
        let _ = place;
        self.stored(name)
    }

    /// Announces that bytes borrowed by [`TensorSource::stored`] will soon be read.
    fn will_need(&self, _bytes: &[u8]) {}

    /// CUDA device of the averaged tensors; `None` for host memory.
    fn device(&self) -> Option<usize> {
        None
    }
}

impl TensorSource for Snapshot {
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        self.stored_near(name, &mut 0)
    }

    fn stored_near(&self, name: &str, place: &mut usize) -> Option<(Dtype, Elements<'_>)> {
        self.tensor_near(name, place).map(|(tensor, bytes)| (tensor.dtype, Elements::Host(bytes)))
    }

    fn will_need(&self, bytes: &[u8]) {
        self.files().iter().for_each(|file| file.will_need(bytes));
    }
}

/// Tensor of the model.
#[derive(Clone, Debug)]
pub(crate) struct ModelTensor {
    pub name: String,
    /// The model's dtype, not that of a stored average.
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// True if the tensor is averaged, false if it is copied from the newest source.
    pub averaged: bool,
}

impl ModelTensor {
    pub(crate) fn into_spec(self) -> TensorSpec {
        TensorSpec { name: self.name, dtype: self.dtype, shape: self.shape }
    }
}

/// Tensors of a model and all sources that hold averages of them.
pub(crate) struct SourceSet<'a> {
    /// Tensors sorted by name.
    pub tensors: Vec<ModelTensor>,
    /// Name of the kept tensor for each tied one.
    pub tied: BTreeMap<String, String>,
    pub sources: Vec<(IndexedSource, &'a dyn TensorSource)>,
}

/// Sources that some plans use, and the weights of each plan.
pub(crate) struct Selection<'a> {
    /// Sources in the order of the set, which is the order of summation.
    pub sources: Vec<&'a dyn TensorSource>,
    /// Weights of plan 0 for all sources, then those of plan 1, and so on.
    pub weights: Vec<f64>,
    /// Newest source at or before the time of each plan.
    pub newest: Vec<&'a dyn TensorSource>,
}

impl<'a> SourceSet<'a> {
    /// Selects the sources that have a weight in any of the plans.
    ///
    /// # Errors
    /// - [`Error::NoTarget`] if `plans` is empty.
    /// - [`Error::OtherPlan`] if a plan was made for other snapshots.
    /// - [`Error::NoSource`] if all sources are newer than a plan.
    pub(crate) fn select(&self, plans: &[&Plan]) -> Result<Selection<'a>> {
        if plans.is_empty() {
            return Err(Error::NoTarget);
        }
        for weight in plans.iter().flat_map(|plan| &plan.weights) {
            if !self.sources.iter().any(|(source, _)| is_of(weight, source)) {
                let missing = format!("snapshot {}.{}", weight.index, weight.step);
                return Err(Error::OtherPlan { missing });
            }
        }
        let is_used = |source: &IndexedSource| plans.iter().any(|plan| weight_of(plan, source) != 0.0);
        let used: Vec<_> = self.sources.iter().filter(|(source, _)| is_used(source)).collect();
        let mut weights = Vec::with_capacity(plans.len() * used.len());
        for plan in plans {
            weights.extend(used.iter().map(|(source, _)| weight_of(plan, source)));
        }
        Ok(Selection {
            sources: used.iter().map(|(_, source)| *source).collect(),
            weights,
            newest: plans.iter().map(|plan| self.newest(plan.at)).collect::<Result<_>>()?,
        })
    }

    fn newest(&self, at: u64) -> Result<&'a dyn TensorSource> {
        let until = self.sources.iter().filter(|(source, _)| source.step <= at);
        let newest = until.max_by_key(|(source, _)| source.step).map(|(_, source)| *source);
        newest.ok_or_else(|| Error::NoSource { wanted: "snapshot to copy from".into(), remedy: "ask for a later step" })
    }

    /// Device of the sources, or `wanted` if all of them are in host memory.
    pub(super) fn device(&self, wanted: Device) -> Device {
        self.sources.iter().find_map(|(_, source)| source.device()).map_or(wanted, Device::Cuda)
    }

    /// Returns the tensor of a name. A tied name has the tensor that is kept for it.
    pub(super) fn find(&self, name: &str) -> Option<&ModelTensor> {
        self.find_kept(self.tied.get(name).map_or(name, String::as_str))
    }

    /// As [`SourceSet::find`], for tensors that are averaged.
    pub(super) fn find_averaged(&self, name: &str) -> Option<&ModelTensor> {
        self.find(name).filter(|tensor| tensor.averaged)
    }

    /// Returns the tensor of a name that is not tied to another.
    pub(super) fn find_kept(&self, name: &str) -> Option<&ModelTensor> {
        let found = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[found])
    }

    /// Iterates over the averaged tensors.
    pub(super) fn averaged(&self) -> impl Iterator<Item = &ModelTensor> {
        self.tensors.iter().filter(|tensor| tensor.averaged)
    }

    /// Iterates over the tensors that are copied from the newest source.
    pub(super) fn copied(&self) -> impl Iterator<Item = &ModelTensor> {
        self.tensors.iter().filter(|tensor| !tensor.averaged)
    }
}

impl<'a> Selection<'a> {
    /// Returns the elements of a copied tensor for a target: those of its newest source.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the source has no such tensor in host memory.
    pub(super) fn copied(&self, target: usize, tensor: &ModelTensor) -> Result<&'a [u8]> {
        let stored = self.newest[target].stored(&tensor.name).and_then(|(_, elements)| elements.host());
        stored.ok_or_else(|| Error::tensor(&tensor.name, "the newest snapshot lacks it"))
    }
}

fn is_of(weight: &Weight, source: &IndexedSource) -> bool {
    (weight.index, weight.step) == (source.index, source.step)
}

/// Weight of a source in a plan, 0 if the plan does not use it.
fn weight_of(plan: &Plan, source: &IndexedSource) -> f64 {
    plan.weights.iter().find(|weight| is_of(weight, source)).map_or(0.0, |weight| weight.weight)
}
