//! Snapshots with their parsed metadata, and the check that their histories belong to one training.

use super::extended::check_extensions;
use crate::error::{Difference, Error, Result};
use crate::math::{Chain, History, Profile};
use crate::planning::read_chain;
use crate::snapshot::Snapshot;

/// Snapshot with its parsed metadata.
pub(super) struct ParsedSnapshot {
    pub snapshot: Snapshot,
    pub profile: Profile,
    pub chain: Chain,
    /// Updates in the average, if they are stored.
    pub history: Option<History>,
}

impl ParsedSnapshot {
    /// Parses the metadata of a snapshot.
    ///
    /// # Errors
    /// As [`read_chain`].
    pub(super) fn new(snapshot: Snapshot) -> Result<ParsedSnapshot> {
        let (profile, chain, history) = read_chain(&snapshot)?;
        check_extensions(&snapshot, history.as_ref())?;
        Ok(ParsedSnapshot { snapshot, profile, chain, history })
    }

    /// Returns true if the updates are known to begin those of another snapshot.
    fn is_prefix_of(&self, other: &ParsedSnapshot) -> bool {
        matches!((&self.history, &other.history), (Some(own), Some(other)) if own.is_prefix_of(other))
    }

    fn last_step(&self) -> u64 {
        self.history.as_ref().and_then(History::last).unwrap_or(0)
    }

    /// Returns an error if the updates are known not to begin those of another snapshot.
    fn check_prefix_of(&self, other: &ParsedSnapshot) -> Result<()> {
        if self.history.is_none() || other.history.is_none() || self.is_prefix_of(other) {
            return Ok(());
        }
        let difference = Difference::new(
            "the history of updates",
            format!("of another (last step {})", other.last_step()),
            format!("of one training (last step {})", self.last_step()),
        );
        Err(Error::mismatch(self.snapshot.path(), other.snapshot.path(), difference))
    }
}

/// Returns the updates of the newest snapshot, or `None` if a snapshot has no history.
///
/// # Errors
/// [`Error::Mismatch`] if the updates of another snapshot are not a prefix of them.
pub(super) fn common_history(snapshots: &[ParsedSnapshot]) -> Result<Option<History>> {
    let Some(newest) = snapshots.iter().max_by_key(|parsed| parsed.snapshot.id.step) else { return Ok(None) };
    if snapshots.iter().any(|parsed| parsed.history.is_none()) {
        return Ok(None);
    }
    snapshots.iter().try_for_each(|parsed| parsed.check_prefix_of(newest))?;
    Ok(newest.history.clone())
}

/// Removes the snapshots whose updates diverge from those of most snapshots, and returns their errors.
///
/// A training that was resumed from an older state leaves such snapshots. They may be newer than the others.
pub(super) fn remove_diverged(snapshots: &mut Vec<ParsedSnapshot>) -> Vec<Error> {
    let prefixes = |end: &ParsedSnapshot| snapshots.iter().filter(|parsed| parsed.is_prefix_of(end)).count();
    let Some(end) = snapshots.iter().max_by_key(|end| (prefixes(end), end.snapshot.id.step)) else { return Vec::new() };
    let errors: Vec<Option<Error>> = snapshots.iter().map(|parsed| parsed.check_prefix_of(end).err()).collect();
    let mut has_diverged = errors.iter().map(Option::is_some).collect::<Vec<_>>().into_iter();
    snapshots.retain(|_| !has_diverged.next().unwrap_or(false));
    errors.into_iter().flatten().collect()
}
