//! Numbers of the files in sets that the processes of a sharded training wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::id::PartNumber;
use crate::error::shown;

/// Numbers of the part files that are there, by the sizes of their sets.
#[derive(Debug, Default)]
pub(super) struct PartNumbers(BTreeMap<usize, BTreeSet<usize>>);

impl PartNumbers {
    pub(super) fn add(&mut self, part: PartNumber) {
        self.0.entry(part.n).or_default().insert(part.i);
    }

    /// Iterates over the sizes of the complete sets.
    pub(super) fn complete(&self) -> impl Iterator<Item = usize> {
        self.0.iter().filter(|(n, found)| **n == found.len()).map(|(n, _)| *n)
    }

    /// Warns of each set that is not complete, with the name of a file that it lacks.
    pub(super) fn warn_of_incomplete(&self, dir: &Path, what: &str, name: &dyn Fn(PartNumber) -> String) {
        for (&n, found) in self.0.iter().filter(|(n, found)| **n != found.len()) {
            // The search ends after at most as many numbers as there are files, whatever size a name claims.
            let missing = (1..=n).find(|i| !found.contains(i)).unwrap_or(n);
            tracing::warn!(
                "{}: {what} is left out: {} of its {n} files are there, and {} is missing, so its write did not end",
                shown(dir),
                found.len(),
                name(PartNumber { i: missing, n })
            );
        }
    }
}
