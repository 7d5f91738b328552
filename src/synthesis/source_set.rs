//! Sources of a blend: snapshots on disk and live averages behind one interface.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use safetensors::Dtype;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::planning::{IndexedSource, LaterTensors, Plan, Weight};
use crate::snapshot::{Snapshot, StoredElements};
use crate::tensor::{ScatteredElements, TensorSpec, equal_elements};

/// Elements of a stored tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Elements<'a> {
    /// Bytes in host memory, mapped files included.
    Host(&'a [u8]),
    /// Pieces of host memory.
    Scattered(&'a dyn ScatteredElements),
    /// Memory of the source's device.
    #[cfg(feature = "cuda")]
    Device(crate::compute::cuda::BlendInput<'a>),
}

impl<'a> Elements<'a> {
    /// Returns a range of the bytes that is in one piece of host memory.
    pub(super) fn piece(self, bytes: Range<usize>) -> Option<&'a [u8]> {
        match self {
            Elements::Host(all) => Some(&all[bytes]),
            Elements::Scattered(elements) => elements.piece(bytes),
            #[cfg(feature = "cuda")]
            Elements::Device(_) => None,
        }
    }

    /// Returns a range of the bytes, copied to `copy` if it is not in one piece. Returns `None` for elements on a
    /// device.
    pub(crate) fn read<'c>(self, bytes: Range<usize>, copy: &'c mut Vec<u8>) -> Option<&'c [u8]>
    where
        'a: 'c,
    {
        match (self.piece(bytes.clone()), self) {
            (None, Elements::Scattered(elements)) => {
                copy.resize(bytes.len(), 0);
                elements.copy(copy, bytes.start);
                Some(copy)
            }
            (piece, _) => piece,
        }
    }

    /// Returns the number of bytes in host memory, 0 for elements on a device.
    pub(crate) fn len(self) -> usize {
        match self {
            Elements::Host(bytes) => bytes.len(),
            Elements::Scattered(elements) => elements.len(),
            #[cfg(feature = "cuda")]
            Elements::Device(_) => 0,
        }
    }

    /// Returns the elements in host memory; `None` for those on a device.
    pub(crate) fn on_host(&self) -> Option<&(dyn ScatteredElements + 'a)> {
        match self {
            Elements::Host(bytes) => Some(bytes),
            Elements::Scattered(elements) => Some(*elements),
            #[cfg(feature = "cuda")]
            Elements::Device(_) => None,
        }
    }

    /// Returns true if two tensors have the same bytes in host memory.
    pub(crate) fn equals(self, other: Elements<'_>) -> bool {
        match (self.on_host(), other.on_host()) {
            (Some(own), Some(others)) => equal_elements(own, others),
            _ => false,
        }
    }

    /// Returns all bytes in host memory, copied if they are not in one piece.
    pub(crate) fn to_bytes(self) -> Cow<'a, [u8]> {
        self.piece(0..self.len()).map_or_else(
            || {
                let mut copy = Vec::new();
                self.read(0..self.len(), &mut copy);
                Cow::Owned(copy)
            },
            Cow::Borrowed,
        )
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

    /// Opens what [`TensorSource::stored`] reads.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Damaged`] for a file that cannot be read any more.
    fn prepare(&self) -> Result<()> {
        Ok(())
    }

    /// Announces that bytes borrowed by [`TensorSource::stored`] will soon be read.
    fn will_need(&self, _bytes: &[u8]) {}

    /// CUDA device of the averaged tensors, the first one if there are several; `None` for host memory.
    fn device(&self) -> Option<usize> {
        None
    }

    /// CUDA device of one averaged tensor; `None` for host memory.
    #[cfg(feature = "cuda")]
    fn device_of(&self, _name: &str) -> Option<usize> {
        self.device()
    }
}

impl<'a> From<StoredElements<'a>> for Elements<'a> {
    fn from(stored: StoredElements<'a>) -> Elements<'a> {
        match stored {
            StoredElements::Whole(bytes) => Elements::Host(bytes),
            StoredElements::Tiled(elements) => Elements::Scattered(elements),
        }
    }
}

impl TensorSource for Snapshot {
    fn prepare(&self) -> Result<()> {
        self.set().map_files()
    }

    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        self.stored_near(name, &mut 0)
    }

    fn stored_near(&self, name: &str, place: &mut usize) -> Option<(Dtype, Elements<'_>)> {
        let (tensor, elements) = self.tensor_near(name, place)?;
        Some((tensor.dtype, elements.into()))
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
    /// Sources of the tensors that began with the run.
    pub first: WeightedSources<'a>,
    /// Newest source at or before the time of each plan.
    pub newest: Vec<&'a dyn TensorSource>,
    /// Tensors whose averages began after the run did, with sources and weights of their own.
    pub later: Vec<LaterSelection<'a>>,
    /// Tensors whose sources are computed while the others are not in memory.
    pub computed: Option<&'a dyn ComputedSources>,
}

/// Sources that are computed for a group of tensors at a time, so that they are never all in memory.
pub(crate) trait ComputedSources: Sync {
    /// Returns true if the sources of a tensor are computed.
    fn computes(&self, tensor: &str) -> bool;

    /// Computes the sources of one group after the other, and calls `take` with each. Keeps nothing of a group.
    ///
    /// # Errors
    /// Those of `take`, and [`Error::Tensor`] for tensors that cannot be computed from.
    fn for_each_group(&self, take: &mut dyn FnMut(&LaterSelection<'_>) -> Result<()>) -> Result<()>;
}

/// Sources of tensors whose averages began after the run did.
pub(crate) struct LaterSelection<'a> {
    pub tensors: BTreeSet<String>,
    pub weighted: WeightedSources<'a>,
}

/// Sources in the order of summation, and their weights: those of plan 0 for all sources, then those of plan 1.
pub(crate) struct WeightedSources<'a> {
    pub sources: Vec<&'a dyn TensorSource>,
    pub weights: Vec<f64>,
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
        for weight in plans.iter().flat_map(|plan| plan.all_weights()) {
            if !self.sources.iter().any(|(source, _)| is_of(weight, source)) {
                let missing = format!("snapshot {}.{}", weight.index, weight.step);
                return Err(Error::OtherPlan { missing });
            }
        }
        let rows: Vec<&[Weight]> = plans.iter().map(|plan| plan.weights.as_slice()).collect();
        let mut later = Vec::with_capacity(plans[0].later.len());
        for (i, LaterTensors { tensors, .. }) in plans[0].later.iter().enumerate() {
            // Plans of one pass are at times with the same tensors, so they have the same groups.
            let rows: Vec<&[Weight]> = plans.iter().map(|plan| plan.later[i].weights.as_slice()).collect();
            later.push(LaterSelection { tensors: tensors.iter().cloned().collect(), weighted: self.weighted(&rows) });
        }
        let first = self.weighted(&rows);
        let newest: Vec<_> = plans.iter().map(|plan| self.newest(plan.at)).collect::<Result<_>>()?;
        let weighted = later.iter().flat_map(|later| &later.weighted.sources).chain(&first.sources);
        weighted.chain(&newest).try_for_each(|source| source.prepare())?;
        Ok(Selection { first, newest, later, computed: None })
    }

    /// Returns the sources that have a weight in any row, with the weights of each row.
    fn weighted(&self, rows: &[&[Weight]]) -> WeightedSources<'a> {
        let is_used = |source: &IndexedSource| rows.iter().any(|row| weight_of(row, source) != 0.0);
        let used: Vec<_> = self.sources.iter().filter(|(source, _)| is_used(source)).collect();
        let mut weights = Vec::with_capacity(rows.len() * used.len());
        for row in rows {
            weights.extend(used.iter().map(|(source, _)| weight_of(row, source)));
        }
        WeightedSources { sources: used.iter().map(|(_, source)| *source).collect(), weights }
    }

    fn newest(&self, at: u64) -> Result<&'a dyn TensorSource> {
        let until = self.sources.iter().filter(|(source, _)| source.step <= at);
        let newest = until.max_by_key(|(source, _)| (source.step, source.extensions)).map(|(_, source)| *source);
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
    /// Returns the sources of a tensor, with their weights.
    pub(super) fn of(&self, tensor: &str) -> &WeightedSources<'a> {
        let later = self.later.iter().find(|later| later.tensors.contains(tensor));
        later.map_or(&self.first, |later| &later.weighted)
    }

    /// Returns true if the sources of a tensor are computed, and so are not among those of this selection.
    pub(super) fn is_computed(&self, tensor: &str) -> bool {
        self.computed.is_some_and(|computed| computed.computes(tensor))
    }

    /// Computes the sources of one group of tensors after the other.
    ///
    /// # Errors
    /// As [`ComputedSources::for_each_group`].
    pub(super) fn for_each_group(&self, mut take: impl FnMut(&LaterSelection<'_>) -> Result<()>) -> Result<()> {
        self.computed.map_or(Ok(()), |computed| computed.for_each_group(&mut take))
    }

    /// Returns the elements of a copied tensor for a target: those of its newest source.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the source has no such tensor in host memory.
    pub(super) fn copied(&self, target: usize, tensor: &ModelTensor) -> Result<Elements<'a>> {
        let lacks = || Error::tensor(&tensor.name, "the newest snapshot lacks it");
        match self.newest[target].stored(&tensor.name).ok_or_else(lacks)? {
            #[cfg(feature = "cuda")]
            (_, Elements::Device(_)) => Err(lacks()),
            (_, elements) => Ok(elements),
        }
    }
}

fn is_of(weight: &Weight, source: &IndexedSource) -> bool {
    (weight.index, weight.step) == (source.index, source.step)
}

/// Weight of a source in a row of a plan, 0 if the row does not use it.
fn weight_of(row: &[Weight], source: &IndexedSource) -> f64 {
    row.iter().find(|weight| is_of(weight, source)).map_or(0.0, |weight| weight.weight)
}
