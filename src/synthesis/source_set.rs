//! What is blended: snapshots on disk and live averages, seen alike.

use std::collections::BTreeMap;

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::planning::{IndexedSource, Plan, Weight};
use crate::snapshot::Snapshot;

use crate::tensor::TensorSpec;

/// Where the elements of a stored tensor lie.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Elements<'a> {
    /// In host memory, mapped files included.
    Host(&'a [u8]),
    /// In memory of the holder's device.
    #[cfg(feature = "cuda")]
    Device(crate::compute::cuda::BlendInput<'a>),
}

impl<'a> Elements<'a> {
    /// Those in host memory.
    pub(crate) fn host(self) -> Option<&'a [u8]> {
        match self {
            Elements::Host(bytes) => Some(bytes),
            #[cfg(feature = "cuda")]
            Elements::Device(_) => None,
        }
    }
}

/// Whatever holds the tensors of an average.
pub(crate) trait TensorSource: Sync {
    /// A tensor's stored dtype and elements.
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)>;

    /// As [`TensorSource::stored`], with the place where another holder has the tensor, in the order of names: most have it there,
    /// too. `place` is then where this one has it.
    fn stored_near(&self, name: &str, place: &mut usize) -> Option<(Dtype, Elements<'_>)> {
        let _ = place;
        self.stored(name)
    }

    /// Is told that bytes of it, as [`TensorSource::stored`] lends them, will soon be read.
    fn will_need(&self, _bytes: &[u8]) {}

    /// The device on which averaged tensors lie; none for the host.
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

/// A tensor of the model.
#[derive(Clone, Debug)]
pub(crate) struct ModelTensor {
    pub name: String,
    /// The model's dtype.
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Whether it is averaged; otherwise the newest source's is taken.
    pub averaged: bool,
}

impl ModelTensor {
    pub(crate) fn into_spec(self) -> TensorSpec {
        TensorSpec { name: self.name, dtype: self.dtype, shape: self.shape }
    }
}

/// Everything that a blend reads from.
pub(crate) struct SourceSet<'a> {
    /// In order of their names.
    pub tensors: Vec<ModelTensor>,
    /// `dropped name -> kept name`.
    pub tied: BTreeMap<String, String>,
    pub holders: Vec<(IndexedSource, &'a dyn TensorSource)>,
}

/// The sources that some plans use, and the weights of each plan for all of them.
pub(crate) struct Selection<'a> {
    /// In the order of the pool, and so of the summation.
    pub holders: Vec<&'a dyn TensorSource>,
    /// The weights of plan 0 for all holders, then those of plan 1, and so on.
    pub weights: Vec<f64>,
    /// The newest source at or before the time of each plan.
    pub newest: Vec<&'a dyn TensorSource>,
}

impl<'a> SourceSet<'a> {
    /// Finds the sources of plans.
    ///
    /// # Errors
    /// [`Error::NoTarget`] without a plan, and [`Error::OtherPlan`] for one that was made for other snapshots.
    pub(crate) fn select(&self, plans: &[&Plan]) -> Result<Selection<'a>> {
        if plans.is_empty() {
            return Err(Error::NoTarget);
        }
        let weight_of = |plan: &Plan, source: &IndexedSource| {
            let own = |weight: &&Weight| (weight.index, weight.step) == (source.index, source.step);
            plan.weights.iter().find(own).map_or(0.0, |weight| weight.weight)
        };
        for weight in plans.iter().flat_map(|plan| &plan.weights) {
            if !self.holders.iter().any(|(source, _)| (source.index, source.step) == (weight.index, weight.step)) {
                let missing = format!("snapshot {}.{}", weight.index, weight.step);
                return Err(Error::OtherPlan { missing });
            }
        }
        let used = |source: &IndexedSource| plans.iter().any(|plan| weight_of(plan, source) != 0.0);
        let chosen: Vec<_> = self.holders.iter().filter(|(source, _)| used(source)).collect();
        let row = |plan: &&Plan| chosen.iter().map(|(source, _)| weight_of(plan, source)).collect::<Vec<_>>();
        Ok(Selection {
            holders: chosen.iter().map(|(_, holder)| *holder).collect(),
            weights: plans.iter().flat_map(row).collect(),
            newest: plans.iter().map(|plan| self.newest(plan.at)).collect::<Result<_>>()?,
        })
    }

    fn newest(&self, at: u64) -> Result<&'a dyn TensorSource> {
        let until = self.holders.iter().filter(|(source, _)| source.step <= at);
        let newest = until.max_by_key(|(source, _)| source.step).map(|(_, holder)| *holder);
        newest.ok_or_else(|| Error::NoSource { wanted: "snapshot to copy from".into(), remedy: "ask for a later step" })
    }
}
