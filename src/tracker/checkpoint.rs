//! When the live averages are stored.

use super::PostHocEma;
use super::moment::{CheckpointMeta, Failure};
use crate::error::Result;

impl PostHocEma {
    /// Stores the live state and a snapshot of every average, in the background where that is allowed.
    pub(super) fn checkpoint(&mut self) -> Result<()> {
        let moment = self.moment(self.history.last());
        let done = if self.in_background { self.engine.checkpoint(moment) } else { self.engine.store(&moment) };
        match done {
            Ok(()) | Err(Failure::Removal(_)) => (self.stored, self.pending) = (self.history.last(), false),
            Err(Failure::Files(_)) => self.pending = true,
            Err(Failure::Values(_)) => {}
        }
        done.map_err(Failure::into_error)
    }

    /// Tries once more to store what could not be stored, before the averages move on.
    pub(super) fn retry(&mut self) {
        if !self.pending {
            return;
        }
        if let Err(error) = self.checkpoint() {
            tracing::warn!("the snapshot of step {} is given up: {error}", self.history.last().unwrap_or(0));
            self.pending = false;
        }
    }

    /// Writes what a process that died left unwritten of its last checkpoint, and drops what it did not come to drop.
    pub(super) fn complete(&mut self) -> Result<()> {
        self.write_missing()?;
        if let Err(error) = self.moment(self.stored).drop_surplus() {
            tracing::warn!("a snapshot more than retention keeps stays until the next checkpoint: {error}");
        }
        Ok(())
    }

    fn write_missing(&mut self) -> Result<()> {
        if self.stored.is_none() || self.stored != self.history.last() {
            return Ok(());
        }
        let moment = self.moment(self.stored);
        let missing = moment.missing()?;
        if missing.is_empty() {
            return Ok(());
        }
        moment.complete(&self.engine.values()?.values(), &missing)
    }

    /// Stores the live state, so that a resume goes on from here; no snapshot is written.
    ///
    /// To be called wherever the training's own checkpoints are saved.
    ///
    /// # Errors
    /// [`Error::NonFinite`](crate::Error::NonFinite) where an average holds NaN or infinity,
    /// [`Error::Io`](crate::Error::Io); the state that was stored before is then untouched. A snapshot that could not
    /// be written in the background is told here too; the state is stored nevertheless.
    pub fn save(&self) -> Result<()> {
        // What waits holds an older state, which must not come after this one.
        let flushed = self.engine.flush();
        // A checkpoint that is still to be completed is the resume's to complete, whoever wrote the state last.
        let stored = if self.pending { self.history.last() } else { self.stored };
        self.moment(stored).save(&self.engine.values()?.values())?;
        flushed
    }

    /// Waits until every snapshot so far is on disk: for who reads the run's directory while the training goes on.
    ///
    /// # Errors
    /// What kept a snapshot from being stored, where no call has told it yet.
    pub fn flush(&self) -> Result<()> {
        self.engine.flush()
    }

    /// Ends the run: stores a snapshot of the newest update where there is none yet, and the live state.
    ///
    /// # Errors
    /// As [`PostHocEma::update`]; it can then be called again.
    pub fn finish(&mut self) -> Result<()> {
        if self.history.is_empty() {
            return Ok(());
        }
        if self.stored == self.history.last() && self.engine.last_failed_step() != self.stored {
            self.save()?;
            return self.moment(self.stored).drop_surplus();
        }
        self.checkpoint()?;
        self.engine.flush()
    }

    /// The run as it is now, with `stored` for the newest step of which there are, or will be, snapshots.
    pub(super) fn moment(&self, stored: Option<u64>) -> CheckpointMeta {
        CheckpointMeta {
            dir: self.dir.clone(),
            settings: self.settings.clone(),
            table: self.table.clone(),
            clock: self.clock,
            history: self.history.clone(),
            stored,
            run: self.run.clone(),
        }
    }
}
