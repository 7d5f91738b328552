//! Background storing of averages that one thread copies and another writes.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::copy_buffer::CopyBuffer;
use super::worker::Worker;
use crate::error::{Error, Result};
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::values::OwnedValues;
use crate::tracker::writer::{Job, Writer};

/// Two threads: one works on the averages, the other writes files.
pub(super) struct Background {
    // Declared first, so that it is dropped first: its jobs submit to the writer.
    worker: Worker,
    writer: Arc<Writer>,
    /// Newest step whose values could not be read; 0 for none, since updates begin at 1.
    lost: Arc<AtomicU64>,
    reads: Arc<Reads>,
}

/// Number of checkpoints whose values are still to be read, and its condition variable.
type Reads = (Mutex<usize>, Condvar);

/// Guard that counts one read; a panic drops it too.
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

    /// Queues a job that works on the averages.
    pub(super) fn work(&self, job: impl FnOnce() -> Result<()> + Send + 'static) {
        self.worker.submit(job);
    }

    /// Waits until all jobs on the averages are done; files may still be being written.
    pub(super) fn wait(&self) {
        self.worker.wait();
    }

    /// Waits until the values of all checkpoints have been read.
    pub(super) fn wait_for_reads(&self) {
        let (count, done) = &*self.reads;
        let mut reading = count.lock().unwrap_or_else(PoisonError::into_inner);
        while *reading > 0 {
            reading = done.wait(reading).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Queues a job that gets the values of a checkpoint and submits them to the writer.
    ///
    /// `get` returns none if it has stored them itself. Their memory goes to `copy_buffer` afterwards.
    pub(super) fn store(
        &self,
        meta: CheckpointMeta,
        copy_buffer: Option<CopyBuffer>,
        get: impl FnOnce(&CheckpointMeta) -> Result<Option<OwnedValues>, Failure> + Send + 'static,
    ) {
        let (writer, reading) = (self.writer.clone(), Reading::begin(&self.reads));
        // Set before the values are read and reset afterwards, so that a panic leaves it set.
        let lost = self.lost.clone();
        self.worker.submit(move || {
            let (step, before) = (meta.step(), lost.load(Ordering::Relaxed));
            lost.store(step, Ordering::Relaxed);
            let values = get(&meta).inspect(|_| lost.store(before, Ordering::Relaxed));
            // Dropped before the writer may block: the averages may change from here on.
            drop(reading);
            let Some(values) = values.map_err(Failure::into_error)? else { return Ok(()) };
            writer.submit(Job { meta, values, recycle: copy_buffer.map(|buffer| buffer.recycle()) })
        });
    }

    /// Takes the first unreported error.
    pub(super) fn take_error(&self) -> Option<Error> {
        self.worker.take_error().or_else(|| self.writer.take_error())
    }

    /// Waits until everything is written, and returns the first unreported error.
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

    /// Waits until everything is written; errors of checkpoints are kept.
    pub(super) fn wait_idle(&self) -> Result<()> {
        self.worker.wait();
        self.writer.wait_idle()
    }

    /// Returns the newest step that should have been stored and could not be.
    pub(super) fn last_failed_step(&self) -> Option<u64> {
        let lost = self.lost.load(Ordering::Relaxed);
        self.writer.last_failed_step().into_iter().chain((lost > 0).then_some(lost)).max()
    }
}
