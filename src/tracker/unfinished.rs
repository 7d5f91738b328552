//! The end of a tracker without [`PostHocEma::finish`]: what a resume would lose is said.

use super::PostHocEma;
use crate::error::shown;
use crate::run::SavedState;

impl PostHocEma {
    /// Returns true if the live state on disk is that of now, so that a resume would lose nothing.
    ///
    /// Before the first update there is nothing to lose.
    ///
    /// A process of a sharded run answers for its own file.
    pub fn is_saved(&self) -> bool {
        if self.shard.is_some() {
            let meta = self.checkpoint_meta(self.stored);
            return meta.stores_nothing() || self.history().is_empty() || meta.is_state_on_disk(&meta.state_path());
        }
        match SavedState::of(&self.dir) {
            Ok(Some(saved)) => saved.step == self.clock && saved.updated == self.history().last(),
            _ => self.history().is_empty(),
        }
    }

    /// Ends the tracker without a warning of what was not stored, for a caller who gives that up.
    ///
    /// Snapshots that are being written are completed.
    pub fn abandon(mut self) {
        self.is_abandoned = true;
    }

    /// Returns the steps that a resume would repeat, as text; none if it loses no update.
    fn unsaved(&self) -> Option<String> {
        let updated = self.history().last()?;
        if self.shard.is_some() && self.is_saved() {
            return None;
        }
        let from = match SavedState::of(&self.dir) {
            Ok(Some(saved)) if saved.updated == Some(updated) => return None,
            Ok(Some(saved)) => format!("a resume goes on from step {}", saved.step),
            _ => "it cannot be resumed".to_owned(),
        };
        Some(format!("the run ends at step {} without `finish` or `save`: {from}", self.clock))
    }
}

/// Warns of updates that are not stored. A forked child, and a run whose directory was removed, say nothing.
impl Drop for PostHocEma {
    fn drop(&mut self) {
        if self.is_abandoned || !self.lock.is_own() || !self.dir.is_dir() {
            return;
        }
        // A checkpoint that is still being written may hold the newest update.
        let _ = self.engine.wait_idle();
        let _ = self.settle();
        while let Err(error) = self.non_finite.take_error() {
            tracing::warn!("{}: {error}", shown(&self.dir));
        }
        if let Some(unsaved) = self.unsaved() {
            tracing::warn!("{}: {unsaved}", shown(&self.dir));
        }
    }
}
