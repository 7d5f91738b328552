//! Tensors of an extended run: which of them a synthesis has, and since when they are averaged.

use std::collections::{BTreeMap, BTreeSet};

use super::Run;
use crate::error::{Error, Result};
use crate::math::History;
use crate::planning::{IndexedSource, LaterGroup, Plan, Weight};
use crate::snapshot::{Extension, Snapshot, SnapshotId, beginning_of};
use crate::synthesis::{ModelTensor, SourceSet, TensorSource};
use crate::tensor::{TensorSpec, is_averaged};

impl Run {
    /// Returns the changes of the run's tensors, the oldest first.
    ///
    /// A tensor that one of them began is averaged from that step on. A synthesis at an earlier step does not have it.
    pub fn extensions(&self) -> &[Extension] {
        &self.newest().meta.extensions
    }

    /// Returns the tensors of a synthesis at a step, by name. They differ from [`Run::tensors`] if the run was extended
    /// after that step.
    pub fn tensors_at(&self, step: u64) -> Vec<TensorSpec> {
        model_tensors(self.model_at(step)).into_iter().map(ModelTensor::into_spec).collect()
    }

    /// Returns the names of the tensors that are averaged at a step. The others are copied.
    pub fn averaged_at(&self, step: u64) -> Vec<String> {
        let averaged = model_tensors(self.model_at(step)).into_iter().filter(|tensor| tensor.averaged);
        averaged.map(|tensor| tensor.name).collect()
    }

    /// Returns the names of tied tensors at a step, as `dropped name -> kept name`.
    pub fn tied_at(&self, step: u64) -> &BTreeMap<String, String> {
        &self.model_at(step).meta.tied
    }

    /// Returns the newest snapshot.
    pub(super) fn newest(&self) -> &Snapshot {
        self.model_at(u64::MAX)
    }

    /// Returns the snapshot that has the tensors of a synthesis at a step: the newest one that is not later.
    pub(super) fn model_at(&self, step: u64) -> &Snapshot {
        let age = |snapshot: &&Snapshot| (snapshot.id.step, snapshot.meta.extensions.len());
        let until = self.snapshots.iter().rev().filter(|snapshot| snapshot.id.step <= step);
        until.max_by_key(age).unwrap_or(&self.snapshots[0])
    }

    /// Returns the averaged tensors at a step that began after the run did, by the extension that began them.
    pub(super) fn later_groups(&self, step: u64) -> Vec<LaterGroup> {
        let model = self.model_at(step);
        let averaged = model_tensors(model).into_iter().filter(|tensor| tensor.averaged);
        later_groups(&model.meta.extensions, averaged.map(|tensor| tensor.name))
    }

    /// Returns the snapshots as the sources of a synthesis of these plans.
    ///
    /// # Errors
    /// [`Error::Setting`] for plans at steps with different tensors.
    pub(super) fn source_set_of<'p>(&self, plans: impl IntoIterator<Item = &'p Plan>) -> Result<SourceSet<'_>> {
        let mut plans = plans.into_iter();
        let Some(first) = plans.next() else { return Ok(self.source_set(self.newest())) };
        let model = self.model_at(first.at);
        match plans.find(|plan| self.model_at(plan.at).meta.extensions.len() != model.meta.extensions.len()) {
            Some(other) => {
                let reason = format!(
                    "the run was extended between the steps {} and {}, which have different tensors: synthesize them \
                     one after the other",
                    first.at.min(other.at),
                    first.at.max(other.at)
                );
                Err(Error::Setting { option: "plans", reason })
            }
            None => Ok(self.source_set(model)),
        }
    }

    /// Returns the snapshots as the sources of a synthesis of the tensors that `model` has.
    pub(super) fn source_set(&self, model: &Snapshot) -> SourceSet<'_> {
        SourceSet { tensors: model_tensors(model), tied: model.meta.tied.clone(), sources: self.tensor_sources() }
    }

    /// Returns the snapshots as holders of tensors.
    pub(crate) fn tensor_sources(&self) -> Vec<(IndexedSource, &dyn TensorSource)> {
        let sources = self.sources().into_iter().zip(&self.snapshots);
        sources.map(|(source, snapshot)| (source, snapshot as &dyn TensorSource)).collect()
    }

    /// Returns the bytes that one pass over the snapshots reads.
    pub(super) fn bytes_of_pass(&self, plans: &[Plan]) -> u64 {
        let Some(first) = plans.first() else { return 0 };
        let mut groups: BTreeMap<&str, usize> = BTreeMap::new();
        for (i, later) in first.later.iter().enumerate() {
            groups.extend(later.tensors.iter().map(|name| (name.as_str(), i + 1)));
        }
        let mut used = vec![used(plans.iter().flat_map(|plan| &plan.weights))];
        for i in 0..first.later.len() {
            let rows = plans.iter().filter_map(|plan| plan.later.get(i));
            used.push(self::used(rows.flat_map(|later| &later.weights)));
        }
        let averaged: Vec<ModelTensor> = model_tensors(self.model_at(first.at));
        let averaged: Vec<&ModelTensor> = averaged.iter().filter(|tensor| tensor.averaged).collect();
        let mut total = 0;
        for snapshot in &self.snapshots {
            let mut place = 0;
            for tensor in &averaged {
                let group = groups.get(tensor.name.as_str()).copied().unwrap_or(0);
                if used[group].contains(&snapshot.id)
                    && let Some(bytes) = snapshot.bytes_of(&tensor.name, &mut place)
                {
                    total += bytes;
                }
                place += 1;
            }
        }
        total
    }
}

/// Returns the snapshots that have a weight.
pub(super) fn used<'a>(weights: impl Iterator<Item = &'a Weight>) -> BTreeSet<SnapshotId> {
    let with_weight = weights.filter(|weight| weight.weight != 0.0);
    with_weight.map(|weight| SnapshotId { index: weight.index, step: weight.step }).collect()
}

/// Returns the tensors that a snapshot has.
pub(super) fn model_tensors(snapshot: &Snapshot) -> Vec<ModelTensor> {
    let mut tensors = Vec::new();
    for (name, stored) in snapshot.tensors() {
        let dtype = snapshot.model_dtype(name, stored.dtype);
        let averaged = is_averaged(dtype) && !snapshot.meta.copied.contains(name);
        tensors.push(ModelTensor { name: name.to_owned(), dtype, shape: stored.shape.clone(), averaged });
    }
    tensors
}

/// Groups tensors that began after the run did by the extension that began them.
pub(crate) fn later_groups(extensions: &[Extension], averaged: impl Iterator<Item = String>) -> Vec<LaterGroup> {
    let mut groups: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for name in averaged {
        match beginning_of(extensions, &name) {
            0 => {}
            extension => groups.entry(extension).or_default().push(name),
        }
    }
    let group = |(extension, tensors): (usize, Vec<String>)| LaterGroup {
        extension,
        since: extensions[extension - 1].at,
        tensors,
    };
    groups.into_iter().map(group).collect()
}

/// Checks that a snapshot's extensions are at updates in its history, in order.
///
/// # Errors
/// [`Error::Damaged`].
pub(super) fn check_extensions(snapshot: &Snapshot, history: Option<&History>) -> Result<()> {
    let mut last = 0;
    for extension in &snapshot.meta.extensions {
        if extension.at < last || !history.is_some_and(|history| history.contains(extension.at)) {
            let why = format!(
                "the metadata's `extensions` has a change at step {}, which is not the step of an update",
                extension.at
            );
            return Err(Error::damaged(snapshot.path(), why));
        }
        last = extension.at;
    }
    Ok(())
}
