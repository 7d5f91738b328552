//! Sources of a solve: the averages of a run.

use crate::math::{Chain, ChainSource};

/// An average of a run: a snapshot on disk, or a live average.
#[derive(Clone, Debug)]
pub(crate) struct IndexedSource {
    /// The index of its profile within the run.
    pub index: usize,
    /// The time of the newest update in it.
    pub step: u64,
    pub chain: Chain,
    /// The number of extensions of the run before it.
    pub extensions: usize,
    /// Name in errors: a file's path, or the live average.
    pub label: String,
}

impl IndexedSource {
    pub(crate) fn to_chain_source(&self) -> ChainSource {
        ChainSource { chain: self.chain.clone(), step: self.step, label: self.label.clone() }
    }
}
