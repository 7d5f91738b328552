//! Extensions of a run: tensors that begin after the run did, and tensors that end before it does.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Change of the set of tensors that a run tracks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extension {
    /// Step of the last update before the change.
    pub at: u64,
    /// Tensors whose averages begin, with their values at the change.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub begun: BTreeSet<String>,
    /// Tensors of earlier snapshots that the run has no longer, or that begin again in another shape.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ended: BTreeSet<String>,
    /// Tensors that go on in another dtype of the model.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub retyped: BTreeSet<String>,
}

impl Extension {
    /// Returns true if nothing changed.
    pub fn is_empty(&self) -> bool {
        self.begun.is_empty() && self.ended.is_empty() && self.retyped.is_empty()
    }
}

/// Returns the number of the extension that a tensor began with, from 1; 0 if it began with the run.
pub(crate) fn beginning_of(extensions: &[Extension], tensor: &str) -> usize {
    extensions.iter().rposition(|extension| extension.begun.contains(tensor)).map_or(0, |i| i + 1)
}

/// Tensors that two snapshots of a run may differ in, because the run was extended between them.
pub(super) struct AllowedDifferences<'a>(Vec<&'a Extension>);

impl<'a> AllowedDifferences<'a> {
    /// Returns the extensions that only one of two snapshots has, or `None` if neither list begins the other.
    pub(super) fn between(a: &'a [Extension], b: &'a [Extension]) -> Option<AllowedDifferences<'a>> {
        let common = a.len().min(b.len());
        let longer = if a.len() > b.len() { a } else { b };
        (a[..common] == b[..common]).then(|| AllowedDifferences(longer[common..].iter().collect()))
    }

    /// Returns true if there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns true if both snapshots must have the tensor.
    pub(super) fn keeps(&self, tensor: &str) -> bool {
        !self.0.iter().any(|extension| extension.begun.contains(tensor) || extension.ended.contains(tensor))
    }

    /// Returns true if both snapshots must have the tensor in one dtype.
    pub(super) fn keeps_dtype(&self, tensor: &str) -> bool {
        !self.0.iter().any(|extension| extension.retyped.contains(tensor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(at: u64, names: &[&str]) -> Extension {
        let begun = names.iter().map(|&name| name.to_owned()).collect();
        Extension { at, begun, ..Extension::default() }
    }

    #[test]
    fn newest_extension_that_began_a_tensor_counts() {
        let extensions = [begun(10, &["a", "b"]), begun(20, &["b"])];
        assert_eq!(["a", "b", "c"].map(|name| beginning_of(&extensions, name)), [1, 2, 0]);
    }

    #[test]
    fn lists_that_diverge_allow_no_comparison() {
        let a = [begun(10, &["a"])];
        let b = [begun(20, &["a"])];
        assert!(AllowedDifferences::between(&a, &b).is_none());
        let longer = [a[0].clone(), b[0].clone()];
        for (a, b) in [(&a[..], &longer[..]), (&longer[..], &a[..])] {
            let allowed = AllowedDifferences::between(a, b).unwrap();
            assert!(!allowed.is_empty() && !allowed.keeps("a") && allowed.keeps("c") && allowed.keeps_dtype("a"));
        }
    }
}
