//! Division of the tensors among the processes: of equal rectangles, the lowest process stores its own.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::compare::{Holding, TensorGroups};
use super::disagreement;
use super::manifest::{ManifestTensor, ShardManifest};
use super::tiling::{HeldRectangle, first_overlap};
use crate::error::{Result, shown};

/// Returns the names of the tensors that each process stores.
///
/// # Errors
/// [`Error::Disagreement`](crate::Error::Disagreement) for a tensor whose rectangles overlap, leave a hole, or have
/// replicas of other values.
pub(super) fn stored<'a>(manifests: &[ShardManifest], groups: &TensorGroups<'a>) -> Result<Vec<HashSet<&'a str>>> {
    let mut stored = vec![HashSet::new(); manifests.len()];
    for (name, holders) in groups.stored() {
        for i in storing_of(manifests, name, holders)? {
            stored[i].insert(name);
        }
    }
    Ok(stored)
}

/// Returns the tensors of a process that hold elements which another process stores.
pub(super) fn replicas(
    manifest: &ShardManifest,
    groups: &TensorGroups<'_>,
    stored: &HashSet<&str>,
) -> BTreeSet<String> {
    let is_replica = |tensor: &&ManifestTensor| {
        let name = tensor.name.as_str();
        !tensor.is_left_out && !groups.ties.contains_key(name) && !stored.contains(name)
    };
    manifest.tensors.iter().filter(is_replica).map(|tensor| tensor.name.clone()).collect()
}

/// Returns the indices of the manifests of the processes that store rectangles of a tensor.
fn storing_of(manifests: &[ShardManifest], name: &str, holders: &[Holding<'_>]) -> Result<Vec<usize>> {
    let global = &holders[0].1.global;
    let total: usize = global.iter().product();
    let mut ordered: Vec<&Holding<'_>> = holders.iter().collect();
    ordered.sort_by_key(|(i, _)| manifests[*i].process);
    if total == 0 {
        return Ok(ordered.first().map(|(i, _)| *i).into_iter().collect());
    }
    let mut distinct: HashMap<HeldRectangle<'_>, Vec<&Holding<'_>>> = HashMap::new();
    for holding in ordered.into_iter().filter(|(_, tensor)| !tensor.is_empty()) {
        let ManifestTensor { offset, shape, .. } = holding.1;
        distinct.entry(HeldRectangle { offset, shape }).or_default().push(holding);
    }
    let mut chosen: Vec<(HeldRectangle<'_>, usize)> = Vec::with_capacity(distinct.len());
    for (rectangle, replicas) in distinct {
        check_values(manifests, name, &replicas)?;
        let first = replicas.iter().find(|(_, tensor)| !tensor.is_replica);
        chosen.extend(first.map(|(i, _)| (rectangle, *i)));
    }
    chosen.sort_by_key(|(_, i)| manifests[*i].process);
    check_tiling(manifests, name, global, &chosen)?;
    Ok(chosen.into_iter().map(|(_, i)| i).collect())
}

/// Checks that replicas of a rectangle have equal first values. Buffers have no fingerprint.
fn check_values(manifests: &[ShardManifest], name: &str, replicas: &[&Holding<'_>]) -> Result<()> {
    let (first, tensor) = replicas[0];
    let Some((other, _)) = replicas.iter().find(|(_, other)| other.fingerprint != tensor.fingerprint) else {
        return Ok(());
    };
    let reason = format!(
        "both hold the elements at offset {:?}, of shape {:?}, of tensor `{}`, with different values: replicas must be \
         equal before the first update. If these are tensors of their own, such as experts, give them names of their \
         own, or the place of each in a larger tensor",
        tensor.offset,
        tensor.shape,
        shown(name)
    );
    Err(disagreement(vec![manifests[*first].process, manifests[*other].process], reason))
}

/// Checks that rectangles cover a tensor, each element once.
fn check_tiling(
    manifests: &[ShardManifest],
    name: &str,
    global: &[usize],
    chosen: &[(HeldRectangle<'_>, usize)],
) -> Result<()> {
    let processes = || chosen.iter().map(|(_, i)| manifests[*i].process).collect();
    let rectangles: Vec<HeldRectangle<'_>> = chosen.iter().map(|(rectangle, _)| *rectangle).collect();
    let name = shown(name);
    if let Some(pair) = rectangles.windows(2).position(|pair| pair[0].shape.len() != pair[1].shape.len()) {
        let pair = [chosen[pair].1, chosen[pair + 1].1].map(|i| manifests[i].process);
        let reason = format!("tensor `{name}` is flattened on the one and not on the other: cut it alike on all");
        return Err(disagreement(pair.to_vec(), reason));
    }
    if let Some((a, b)) = first_overlap(&rectangles) {
        let pair = [a, b].map(|i| manifests[chosen[i].1].process);
        let place = |i: usize| format!("{:?} at {:?}", rectangles[i].shape, rectangles[i].offset);
        let reason = format!(
            "their parts of tensor `{name}` overlap: {} and {} of {global:?}. Parts must be equal or apart",
            place(a),
            place(b)
        );
        return Err(disagreement(pair.to_vec(), reason));
    }
    let total: usize = global.iter().product();
    let covered: usize = rectangles.iter().map(HeldRectangle::volume).sum();
    if covered != total {
        let reason = format!(
            "together they hold {covered} of the {total} elements of tensor `{name}`: a process with the other parts \
             is missing, or calls all of its parts replicas"
        );
        return Err(disagreement(processes(), reason));
    }
    Ok(())
}
