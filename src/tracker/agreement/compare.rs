//! Comparison of manifests: options, and what all processes must know of each tensor alike.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::disagreement;
use super::manifest::{ManifestTensor, ShardManifest};
use crate::error::{Error, Result, shown};
use crate::tensor::is_averaged;
use crate::tracker::tensor_choice::TensorChoice;

/// Checks that there are manifests, each of another process.
///
/// # Errors
/// [`Error::Setting`] if there are none, and [`Error::Disagreement`] for two of one number.
pub(super) fn check_processes(manifests: &[ShardManifest]) -> Result<()> {
    if manifests.is_empty() {
        return Err(Error::Setting { option: "manifests", reason: "there are none: pass one of each process".into() });
    }
    let mut seen = HashSet::new();
    match manifests.iter().find(|manifest| !seen.insert(manifest.process)) {
        Some(ShardManifest { process, .. }) => {
            Err(disagreement(vec![*process], "there are two manifests of this number: number all processes".into()))
        }
        None => Ok(()),
    }
}

/// Checks that all processes have the options of the first.
///
/// # Errors
/// [`Error::Disagreement`] for the first option that differs.
pub(super) fn check_options(manifests: &[ShardManifest]) -> Result<()> {
    let first = &manifests[0];
    for other in &manifests[1..] {
        let Some(name) = first
            .options
            .keys()
            .chain(other.options.keys())
            .find(|name| first.options.get(*name) != other.options.get(*name))
        else {
            continue;
        };
        let value = |manifest: &ShardManifest| manifest.options.get(name).map_or("none".to_owned(), shown);
        let (a, b) = (value(first), value(other));
        let reason = format!("the option {name} is {a} on the one and {b} on the other: give all the same");
        return Err(disagreement(vec![first.process, other.process], reason));
    }
    Ok(())
}

/// Tensor of one process: the index of its manifest, and its entry there.
pub(super) type Holding<'a> = (usize, &'a ManifestTensor);

/// Tensors of all processes, by name.
pub(super) struct TensorGroups<'a> {
    /// Holders of each tensor, in the order of the manifests.
    pub holders: BTreeMap<&'a str, Vec<Holding<'a>>>,
    /// Ties of all processes.
    pub ties: BTreeMap<String, String>,
}

impl<'a> TensorGroups<'a> {
    /// Groups the tensors of all processes, and checks that they describe each alike.
    ///
    /// # Errors
    /// [`Error::Disagreement`].
    pub(super) fn new(manifests: &'a [ShardManifest]) -> Result<TensorGroups<'a>> {
        let mut holders: HashMap<&str, Vec<Holding<'a>>> = HashMap::new();
        for (i, manifest) in manifests.iter().enumerate() {
            for tensor in &manifest.tensors {
                holders.entry(&tensor.name).or_default().push((i, tensor));
            }
        }
        for holders in holders.values() {
            check_alike(manifests, holders)?;
        }
        let groups = TensorGroups { holders: holders.into_iter().collect(), ties: ties(manifests)? };
        groups.check_ties(manifests)?;
        Ok(groups)
    }

    /// Iterates over the tensors that are stored.
    pub(super) fn stored(&self) -> impl Iterator<Item = (&'a str, &Vec<Holding<'a>>)> {
        let kept =
            self.holders.iter().filter(|(name, holders)| !self.ties.contains_key(**name) && !holders[0].1.is_left_out);
        kept.map(|(name, holders)| (*name, holders))
    }

    /// Checks the choice of tensors against all names. Returns true if `average` names parameters.
    ///
    /// # Errors
    /// [`Error::Setting`] for a pattern without a match, and [`Error::NothingToAverage`].
    pub(super) fn check_choice(&self, manifest: &ShardManifest) -> Result<bool> {
        let choice = TensorChoice::new(&manifest.settings)?;
        choice.check_names(self.holders.keys().copied())?;
        let has_floats = self.stored().any(|(_, holders)| is_averaged(holders[0].1.dtype));
        if !has_floats {
            return Err(Error::NothingToAverage);
        }
        let mut parameters = self.holders.iter().filter(|(_, holders)| !holders[0].1.is_buffer);
        Ok(choice.average.as_ref().is_some_and(|patterns| parameters.any(|(name, _)| patterns.contains(name))))
    }

    /// Checks that tensors that are tied on one process are separate on no other.
    fn check_ties(&self, manifests: &[ShardManifest]) -> Result<()> {
        for (dropped, kept) in &self.ties {
            let is_separate =
                |(i, tensor): &&Holding<'_>| !tensor.is_empty() && !manifests[*i].ties.contains_key(dropped);
            let tied = manifests.iter().find(|manifest| manifest.ties.contains_key(dropped));
            let separate = self.holders.get(dropped.as_str()).and_then(|holders| holders.iter().find(is_separate));
            if let (Some(tied), Some((i, _))) = (tied, separate) {
                let reason = format!(
                    "tensor `{}` shares the memory of `{}` on one process and not on another: tie them on all, or on \
                     none",
                    shown(dropped),
                    shown(kept)
                );
                return Err(disagreement(vec![tied.process, manifests[*i].process], reason));
            }
        }
        Ok(())
    }
}

/// Returns the ties of all processes.
fn ties(manifests: &[ShardManifest]) -> Result<BTreeMap<String, String>> {
    let mut ties: BTreeMap<&String, (&String, usize)> = BTreeMap::new();
    for ShardManifest { process, ties: own, .. } in manifests {
        for (dropped, kept) in own {
            let &mut (other, first) = ties.entry(dropped).or_insert((kept, *process));
            if other != kept {
                let reason = format!(
                    "tensor `{}` shares the memory of `{}` on the one and of `{}` on the other: list the tensors in \
                     the same order on all",
                    shown(dropped),
                    shown(other),
                    shown(kept)
                );
                return Err(disagreement(vec![first, *process], reason));
            }
        }
    }
    // A kept name that is dropped elsewhere would leave nothing to store.
    for (dropped, (kept, process)) in &ties {
        if let Some((_, other)) = ties.get(kept) {
            let reason = format!(
                "tensors `{}` and `{}` are tied in another order on each: list the tensors in the same order on all",
                shown(dropped.as_str()),
                shown(kept.as_str())
            );
            return Err(disagreement(vec![*process, *other], reason));
        }
    }
    Ok(ties.into_iter().map(|(dropped, (kept, _))| (dropped.clone(), kept.clone())).collect())
}

/// Checks that all holders of a tensor give it the same global shape, dtype and kind.
fn check_alike(manifests: &[ShardManifest], holders: &[Holding<'_>]) -> Result<()> {
    let (one, first) = holders[0];
    for &(other, tensor) in &holders[1..] {
        let kind = |is_buffer| if is_buffer { "a buffer" } else { "a parameter" };
        let (what, a, b) = if tensor.global != first.global {
            ("has the global shape", format!("{:?}", first.global), format!("{:?}", tensor.global))
        } else if tensor.dtype != first.dtype {
            ("has the dtype", first.dtype.to_string(), tensor.dtype.to_string())
        } else if tensor.is_buffer != first.is_buffer {
            ("is", kind(first.is_buffer).to_owned(), kind(tensor.is_buffer).to_owned())
        } else {
            continue;
        };
        let reason = format!(
            "tensor `{}` {what} {a} on the one and {b} on the other: build the same model on all, and give the parts \
             of tensors with their places",
            shown(&tensor.name)
        );
        return Err(disagreement(vec![manifests[one].process, manifests[other].process], reason));
    }
    Ok(())
}
