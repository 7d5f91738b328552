//! Storing what an engine holds elsewhere: copied by one thread, written by another.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::spare::CopyBuffer;
use super::worker::Worker;
use crate::error::{Error, Result};
use crate::tracker::moment::{CheckpointMeta, Failure};
use crate::tracker::values::OwnedValues;
use crate::tracker::writer::{Job, Writer};

/// A thread that works on the averages and one that writes files.
pub(super) struct Background {
    // Dropped first: its jobs hand over to the writer.
    worker: Worker,
    writer: Arc<Writer>,
    /// The newest step whose values could not be had; 0 for none, since updates begin at 1.
    lost: Arc<AtomicU64>,
    reads: Arc<Reads>,
}

/// How many moments' values are still to be read, and a way to wait for them.
type Reads = (Mutex<usize>, Condvar);

/// One that is; over when it is dropped, by a panic too.
struct Reading(Arc<Reads>);

impl Reading {
    fn begin(reads: &Arc<Reads>) -> Reading {
        *reads.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Reading(reads.clone())
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.1.notify_all();
    }
}

impl Background {
    pub(super) fn start(dir: &Path) -> Result<Background> {
        let (worker, writer) = (Worker::start(dir)?, Arc::new(Writer::start(dir)?));
        Ok(Background { worker, writer, lost: Arc::default(), reads: Arc::default() })
    }

    /// Adds a job that works on the averages.
    pub(super) fn work(&self, job: impl FnOnce() -> Result<()> + Send + 'static) {
        self.worker.submit(job);
    }

    /// Waits until all jobs on the averages are done; files may still be written.
    pub(super) fn wait(&self) {
        self.worker.wait();
    }

    /// Waits until all values that are to be stored have been read.
    pub(super) fn wait_for_reads(&self) {
        let (count, done) = &*self.reads;
        let mut reading = count.lock().unwrap_or_else(PoisonError::into_inner);
        while *reading > 0 {
            reading = done.wait(reading).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has the worker get the values of a moment and hand them to the writer, unless it has stored them itself. Their
    /// memory goes to `spare` afterwards.
    pub(super) fn store(
        &self,
        moment: CheckpointMeta,
        spare: Option<CopyBuffer>,
        get: impl FnOnce(&CheckpointMeta) -> Result<Option<OwnedValues>, Failure> + Send + 'static,
    ) {
        let (writer, reading) = (self.writer.clone(), Reading::begin(&self.reads));
        // Taken back where the values are had: a panic leaves it.
        let lost = self.lost.clone();
        self.worker.submit(move || {
            let (step, before) = (moment.step(), lost.load(Ordering::Relaxed));
            lost.store(step, Ordering::Relaxed);
            let values = get(&moment).inspect(|_| lost.store(before, Ordering::Relaxed));
            // Before the writer is waited for: the averages may move on now.
            drop(reading);
            let Some(values) = values.map_err(Failure::into_error)? else { return Ok(()) };
            writer.submit(Job { moment, values, home: spare.map(|spare| spare.home()) })
        });
    }

    /// The first error that was not told yet.
    pub(super) fn take_error(&self) -> Option<Error> {
        self.worker.take_error().or_else(|| self.writer.take_error())
    }

    /// Waits until everything is written.
    pub(super) fn flush(&self) -> Result<()> {
        self.worker.wait();
        let written = self.writer.flush();
        match (self.worker.take_error(), written) {
            (Some(error), Err(other)) => {
                tracing::error!("{other}");
                Err(error)
            }
            (error, written) => error.map_or(written, Err),
        }
    }

    /// Waits until everything is written; errors of checkpoints are kept for who asks.
    pub(super) fn wait_idle(&self) -> Result<()> {
        self.worker.wait();
        self.writer.wait_idle()
    }

    /// The newest step that was to be stored and could not be.
    pub(super) fn last_failed_step(&self) -> Option<u64> {
        let lost = self.lost.load(Ordering::Relaxed);
        self.writer.last_failed_step().into_iter().chain((lost > 0).then_some(lost)).max()
    }
}
