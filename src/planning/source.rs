//! An average as the solve sees it.

use crate::math::{self, Chain};

/// An average of a run: a snapshot on disk, or a live average.
#[derive(Clone, Debug)]
pub(crate) struct IndexedSource {
    /// The index of its profile within the run.
    pub index: usize,
    /// The time of the newest update in it.
    pub step: u64,
    pub chain: Chain,
    /// What errors call it: a file's path, or the live average.
    pub label: String,
}

impl IndexedSource {
    pub(crate) fn for_solve(&self) -> math::ChainSource {
        math::ChainSource { chain: self.chain.clone(), step: self.step, label: self.label.clone() }
    }
}
