//! Series of averages in a folder, as they were found.

use super::AverageDecay;
use super::clock::UpdateClock;
use crate::checkpoint::CheckpointSeries;

/// Series of averages, or of raw weights.
#[derive(Clone, Debug)]
pub(super) struct FoundSeries {
    pub source: CheckpointSeries,
    /// `None` for raw weights.
    pub decay: Option<AverageDecay>,
}

/// Everything that a folder says about its averages.
#[derive(Debug)]
pub(super) struct FoundSet {
    /// Averages in the order of the options, then raw weights.
    pub series: Vec<FoundSeries>,
    /// Updates of the averages; `None` if they are dense and only profiles are known.
    pub clock: Option<UpdateClock>,
    /// Properties of the files, to be reported.
    pub notes: Vec<String>,
    pub warnings: Vec<String>,
}
