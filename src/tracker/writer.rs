//! Background thread that writes checkpoints one after the other.
//!
//! Memory is bounded: while one checkpoint is written, or tried again, one more is queued, and a third submission
//! blocks. A failed checkpoint is tried once more when the next one comes, at [`Writer::wait_idle`], or at the end, and
//! is then given up. Errors are kept until the tracker takes them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::checkpoint_meta::{CheckpointMeta, Failure};
use super::thread::{Ended, JobThread, QueueSlot, Runner, catch_panic};
use super::values::OwnedValues;
use crate::error::{Error, Result, shown};

/// Checkpoint to be written, with its own copy of the values.
pub(super) struct CheckpointJob {
    pub meta: CheckpointMeta,
    pub values: OwnedValues,
    /// Receives the values after the checkpoint is written or given up, so that their memory is reused.
    pub recycle: Option<Recycle>,
}

/// Callback that takes back the memory of values.
pub(super) type Recycle = Box<dyn Fn(OwnedValues) + Send>;

impl CheckpointJob {
    fn write(&self) -> Result<(), Failure> {
        self.meta.store(&self.values.as_values())
    }
}

impl Drop for CheckpointJob {
    fn drop(&mut self) {
        if let Some(recycle) = &self.recycle {
            recycle(std::mem::take(&mut self.values));
        }
    }
}

/// Checkpoints that are stored in the background.
pub(super) trait Pending {
    /// Takes the first unreported error of a checkpoint that has not been written since.
    fn take_error(&self) -> Option<Error>;

    /// Waits until all checkpoints are written or given up, after a second try of one that failed. Keeps their errors.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the writing thread has ended, which only a fault of this crate can cause.
    fn wait_idle(&self) -> Result<()>;

    /// Waits like [`Pending::wait_idle`].
    ///
    /// # Errors
    /// Those of [`Pending::wait_idle`], and the first unreported one.
    fn flush(&self) -> Result<()> {
        self.wait_idle()?;
        self.take_error().map_or(Ok(()), Err)
    }

    /// Returns the newest step that could not be stored and has not been stored since.
    fn last_failed_step(&self) -> Option<u64>;
}

/// Thread that writes the checkpoints of one tracker, in the order of submission.
///
/// Dropping it writes the queued checkpoints, and logs an error that no call has returned.
pub(super) struct Writer {
    dir: PathBuf,
    thread: JobThread<WriterJob>,
    outcome: Arc<Mutex<WriteOutcome>>,
}

enum WriterJob {
    Write(Box<CheckpointJob>),
    /// Tries a failed checkpoint again.
    Flush,
}

/// Result of the checkpoints so far.
#[derive(Default)]
struct WriteOutcome {
    /// First error that has not been taken, with the step of its checkpoint.
    unseen: Option<(u64, Error)>,
    /// Newest step whose checkpoint was given up and has not been written since.
    last_failed_step: Option<u64>,
}

impl Writer {
    /// Starts the thread for the run in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] if the system cannot start a thread.
    pub(super) fn start(dir: &Path) -> Result<Writer> {
        Writer::start_with(dir, CheckpointJob::write)
    }

    /// Starts a thread that writes with `write`.
    pub(super) fn start_with(
        dir: &Path,
        write: impl FnMut(&CheckpointJob) -> Result<(), Failure> + Send + 'static,
    ) -> Result<Writer> {
        let outcome = Arc::new(Mutex::new(WriteOutcome::default()));
        let runner = WriterThread { dir: dir.to_owned(), write, failed: None, outcome: outcome.clone() };
        let thread = JobThread::start("posthoc-ema-writer", dir, 1, runner)?;
        Ok(Writer { dir: dir.to_owned(), thread, outcome })
    }

    /// Queues a checkpoint; blocks while another one is queued.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the thread has ended, which only a fault of this crate can cause.
    pub(super) fn submit(&self, job: CheckpointJob) -> Result<()> {
        self.thread.submit(WriterJob::Write(Box::new(job))).map_err(|Ended| self.ended())?;
        Ok(())
    }

    fn ended(&self) -> Error {
        Error::unexpected(&self.dir, "the thread that writes snapshots has ended: start again and resume the run")
    }
}

impl Pending for Writer {
    fn take_error(&self) -> Option<Error> {
        lock(&self.outcome).unseen.take().map(|(_, error)| error)
    }

    fn wait_idle(&self) -> Result<()> {
        let ticket = self.thread.submit(WriterJob::Flush).map_err(|Ended| self.ended())?;
        self.thread.wait(ticket).map_err(|Ended| self.ended())
    }

    fn last_failed_step(&self) -> Option<u64> {
        lock(&self.outcome).last_failed_step
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The snapshots of a directory that was removed are not missed.
        if self.thread.close()
            && let Some(error) = self.take_error()
            && self.dir.is_dir()
        {
            tracing::error!("{}: a snapshot was not stored: {error}", shown(&self.dir));
        }
    }
}

/// State of the thread.
struct WriterThread<W> {
    dir: PathBuf,
    write: W,
    /// Last checkpoint, if it failed and may be tried again.
    failed: Option<Box<CheckpointJob>>,
    outcome: Arc<Mutex<WriteOutcome>>,
}

impl<W> Runner<WriterJob> for WriterThread<W>
where
    W: FnMut(&CheckpointJob) -> Result<(), Failure> + Send + 'static,
{
    fn run(&mut self, job: WriterJob, slot: QueueSlot<'_, WriterJob>) {
        // This job keeps its place in the queue meanwhile, so that no third checkpoint takes memory.
        let failed = self.retry();
        drop(slot);
        match job {
            WriterJob::Write(job) => self.write_first(job),
            WriterJob::Flush => self.keep_unseen(failed),
        }
    }

    fn finish(&mut self) {
        let failed = self.retry();
        self.keep_unseen(failed);
    }
}

impl<W: FnMut(&CheckpointJob) -> Result<(), Failure>> WriterThread<W> {
    /// Writes a checkpoint for the first time.
    fn write_first(&mut self, job: Box<CheckpointJob>) {
        let step = job.meta.step();
        let written = self.attempt(&job);
        let mut outcome = lock(&self.outcome);
        match written {
            Ok(()) => outcome.written(step),
            Err(Failure::Files(error)) => {
                outcome.keep_unseen(step, error);
                self.failed = Some(job);
            }
            Err(Failure::Values(error)) => {
                outcome.keep_unseen(step, error);
                outcome.last_failed_step = Some(step);
            }
            Err(Failure::Removal(error)) => {
                outcome.written(step);
                outcome.keep_unseen(step, error);
            }
        }
    }

    /// Tries the last checkpoint again if it failed. Returns its step and the error of this try.
    fn retry(&mut self) -> Option<(u64, Error)> {
        let job = self.failed.take()?;
        let step = job.meta.step();
        // The lock is released before a message is logged, so that a slow subscriber does not block the training.
        match self.attempt(&job) {
            Ok(()) => {
                lock(&self.outcome).written(step);
                None
            }
            Err(Failure::Removal(error)) => {
                lock(&self.outcome).written(step);
                tracing::warn!("the snapshot of step {step} is stored, but surplus ones could not be removed: {error}");
                Some((step, error))
            }
            Err(Failure::Files(error) | Failure::Values(error)) => {
                lock(&self.outcome).last_failed_step = Some(step);
                if self.dir.is_dir() {
                    tracing::warn!("giving up the snapshot of step {step} after two tries: {error}");
                }
                Some((step, error))
            }
        }
    }

    fn keep_unseen(&self, failed: Option<(u64, Error)>) {
        if let Some((step, error)) = failed {
            lock(&self.outcome).keep_unseen(step, error);
        }
    }

    /// Writes a checkpoint. A panic becomes an error, and the thread goes on.
    fn attempt(&mut self, job: &CheckpointJob) -> Result<(), Failure> {
        catch_panic(|| (self.write)(job)).unwrap_or_else(|panic| {
            let step = job.meta.step();
            let reason =
                format!("the snapshot of step {step} was not stored: its writer panicked ({panic}); report this");
            Err(Failure::Files(Error::unexpected(&self.dir, reason)))
        })
    }
}

impl WriteOutcome {
    /// Records that a checkpoint is on disk: the error of an earlier try no longer matters.
    fn written(&mut self, step: u64) {
        self.last_failed_step = self.last_failed_step.filter(|failed| *failed != step);
        if let Some((_, error)) = self.unseen.take_if(|(failed, _)| *failed == step) {
            tracing::warn!("the snapshot of step {step} was stored at the second try; the first failed: {error}");
        }
    }

    fn keep_unseen(&mut self, step: u64, error: Error) {
        match &self.unseen {
            None => self.unseen = Some((step, error)),
            // The first error of a step is the one to return; one of another step is logged, not lost.
            Some((first, _)) if *first == step => {}
            Some(_) => tracing::warn!("the snapshot of step {step} was not stored: {error}"),
        }
    }
}

/// Locks the outcome; nothing panics while it holds the lock, so a poisoned one is consistent too.
fn lock(outcome: &Mutex<WriteOutcome>) -> MutexGuard<'_, WriteOutcome> {
    outcome.lock().unwrap_or_else(PoisonError::into_inner)
}
