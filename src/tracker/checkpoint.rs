//! Storing of the live averages: checkpoints, saves, and the end of a run.

use super::PostHocEma;
use super::checkpoint_meta::{CheckpointMeta, Failure};
use crate::error::Result;

impl PostHocEma {
    /// Stores the live state and a snapshot of every average, in the background if that is allowed.
    pub(super) fn checkpoint(&mut self) -> Result<()> {
        self.non_finite.check_shared()?;
        if self.shard.is_some() {
            self.kept.extend(self.settled.last());
            self.retain();
        }
        let meta = self.checkpoint_meta(self.settled.last());
        let done = if self.in_background { self.engine.checkpoint(meta) } else { self.engine.store(&meta) };
        match done {
            Ok(()) | Err(Failure::Removal(_)) => {
                self.stored = self.settled.last();
                self.needs_retry = false;
            }
            Err(Failure::Files(_)) => self.needs_retry = true,
            Err(Failure::Values(_)) => {}
        }
        done.map_err(Failure::into_error)
    }

    /// Tries a failed checkpoint again before the averages change.
    pub(super) fn retry(&mut self) {
        if !self.needs_retry {
            return;
        }
        if let Err(error) = self.checkpoint() {
            let step = self.settled.last().unwrap_or(0);
            tracing::warn!("giving up the snapshot of step {step} after two tries: {error}");
            self.needs_retry = false;
        }
    }

    /// Completes the last checkpoint of a process that died: writes missing snapshots and removes surplus ones.
    ///
    /// The snapshots carry the session of that process, whose state they are made of.
    pub(super) fn complete(&mut self) -> Result<()> {
        self.write_missing()?;
        if self.shard.is_some() {
            // The first process has removed surplus ones already, and has seen those of all.
            return Ok(());
        }
        if let Err(error) = self.checkpoint_meta(self.stored).drop_surplus() {
            tracing::warn!("surplus snapshots stay until the next checkpoint: {error}");
        }
        Ok(())
    }

    fn write_missing(&mut self) -> Result<()> {
        if self.stored.is_none() || self.stored != self.settled.last() {
            return Ok(());
        }
        let meta = self.checkpoint_meta(self.stored);
        let missing = if meta.stores_nothing() { Vec::new() } else { meta.missing()? };
        if missing.is_empty() {
            return Ok(());
        }
        meta.complete(&self.engine.values()?.values(), &missing)
    }

    /// Stores the live state, so that a resume continues from here. Writes no snapshot.
    ///
    /// Call it wherever the training saves its own checkpoints.
    ///
    /// # Errors
    /// [`Error::NonFinite`](crate::Error::NonFinite) if an average holds NaN or infinity, and
    /// [`Error::Io`](crate::Error::Io); the previous state is then untouched. The error of a snapshot that failed in
    /// the background, or of an update with NaN on a device, is returned here too; the state is stored all the same.
    pub fn save(&self) -> Result<()> {
        self.save_state()?;
        self.non_finite.take_error()
    }

    fn save_state(&self) -> Result<()> {
        self.settle_replays()?;
        self.non_finite.check_shared()?;
        // A queued checkpoint holds an older state, which must not replace this one.
        let flushed = self.engine.flush();
        // Names a checkpoint that is still incomplete, so that a resume completes it.
        let stored = if self.needs_retry { self.history().last() } else { self.stored };
        self.checkpoint_meta(stored).save(&self.engine.values()?.values())?;
        flushed
    }

    /// Waits until every snapshot so far is on disk, so that the run can be read while the training goes on.
    ///
    /// # Errors
    /// The first error of a snapshot, or of an update with NaN on a device, that no call has returned yet.
    pub fn flush(&self) -> Result<()> {
        self.settle_replays()?;
        self.engine.flush()?;
        self.non_finite.take_error()
    }

    /// Ends the run: stores the live state, and a snapshot of the newest update if there is none yet.
    ///
    /// # Errors
    /// Those of [`PostHocEma::update`]; it can then be called again.
    pub fn finish(&mut self) -> Result<()> {
        self.settle_replays()?;
        self.settle_history()?;
        self.store_newest()?;
        self.non_finite.take_error()
    }

    fn store_newest(&mut self) -> Result<()> {
        if self.settled.is_empty() {
            return Ok(());
        }
        if self.stored == self.settled.last() && self.engine.last_failed_step() != self.stored {
            self.save_state()?;
            return self.checkpoint_meta(self.stored).drop_surplus();
        }
        self.checkpoint()?;
        self.engine.flush()
    }

    /// Returns the metadata of a checkpoint at this moment; `stored` is the newest step that has, or will have,
    /// snapshots.
    pub(super) fn checkpoint_meta(&self, stored: Option<u64>) -> CheckpointMeta {
        CheckpointMeta {
            dir: self.dir.clone(),
            settings: self.settings.clone(),
            registry: self.registry.clone(),
            clock: self.clock,
            history: self.history().clone(),
            stored,
            run_id: self.run_id.clone(),
            session: self.session.clone(),
            extensions: self.extensions.clone(),
            lineage: self.lineage.clone(),
            shard: self.shard,
            kept: self.kept.clone(),
            resumed_at: self.resumed_at,
            lock: self.lock.id().clone(),
        }
    }
}
