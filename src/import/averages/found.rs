//! Series of averages in a folder, as they were found.

use super::clock::UpdateClock;
use super::{AverageDecay, ImportAverages};
use crate::checkpoint::CheckpointSeries;
use crate::error::{Error, Result};

/// Series of averages, or of raw weights.
#[derive(Clone, Debug)]
pub(super) struct FoundSeries {
    pub source: CheckpointSeries,
    /// `None` for raw weights.
    pub decay: Option<AverageDecay>,
}

/// Everything that a folder says about its averages.
#[derive(Debug, Default)]
pub(super) struct FoundSet {
    /// Averages in the order of the options, then raw weights.
    pub series: Vec<FoundSeries>,
    /// Updates of the averages; `None` if they are dense and only profiles are known.
    pub clock: Option<UpdateClock>,
    /// Properties of the files, to be reported.
    pub notes: Vec<String>,
    pub warnings: Vec<String>,
    /// Tensors that are not weights, but counts of updates.
    pub counts: Vec<String>,
}

/// Checks that no option is given which the files replace.
///
/// # Errors
/// [`Error::Setting`] with the reason.
pub(super) fn check_replaced(import: &ImportAverages, reason: &str) -> Result<()> {
    let given = [
        ("key", !import.keys.is_empty()),
        ("beta", !import.decays.is_empty()),
        ("raw", import.raw.is_some()),
        ("update_every", import.update_every.is_some()),
        ("update_after_step", import.update_after_step.is_some()),
        ("steps", import.steps.is_some()),
    ];
    match given.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(Error::Setting { option, reason: reason.to_owned() }),
        None => Ok(()),
    }
}
