//! Background storing of averages that one thread reads and another writes.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::copy_buffer::CopyBuffer;
use crate::error::{Error, Result};
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::thread::{JobThread, QueueSlot, Runner, Ticket, catch_panic};
use crate::tracker::values::OwnedValues;
use crate::tracker::writer::{CheckpointJob, Pending, Writer};

/// Two threads: one works on the averages, the other writes files.
///
/// Dropping it runs the queued jobs, and logs an error that no call has returned.
pub(in crate::tracker) struct Background {
    // Declared first, so that it is dropped first: its jobs submit to the writer.
    worker: JobThread<AveragesJob>,
    writer: Arc<Writer>,
    /// First error of a job on the averages that has not been taken.
    error: Arc<Mutex<Option<Error>>>,
    /// Newest step whose values could not be read; 0 for none, since updates begin at 1.
    lost: Arc<AtomicU64>,
    /// Newest job that reads the values of a checkpoint.
    read: Ticket,
}

type AveragesJob = Box<dyn FnOnce() -> Result<()> + Send>;

/// State of the thread that works on the averages.
struct AveragesThread {
    dir: PathBuf,
    error: Arc<Mutex<Option<Error>>>,
}

impl Runner<AveragesJob> for AveragesThread {
    fn run(&mut self, job: AveragesJob, _: QueueSlot<'_, AveragesJob>) {
        let result = catch_panic(job).unwrap_or_else(|panic| {
            let reason = format!("the thread that works on the averages panicked ({panic}): resume the run");
            Err(Error::unexpected(&self.dir, reason))
        });
        if let Err(error) = result {
            lock(&self.error).get_or_insert(error);
        }
    }
}

impl Background {
    /// Starts both threads for the run in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] if the system cannot start a thread.
    pub(in crate::tracker) fn start(dir: &Path) -> Result<Background> {
        let error = Arc::default();
        let runner = AveragesThread { dir: dir.to_owned(), error: Arc::clone(&error) };
        Ok(Background {
            worker: JobThread::start("posthoc-ema-worker", dir, usize::MAX, runner)?,
            writer: Arc::new(Writer::start(dir)?),
            error,
            lost: Arc::default(),
            read: Ticket::default(),
        })
    }

    /// Queues a job that works on the averages.
    pub(in crate::tracker) fn work(&self, job: impl FnOnce() -> Result<()> + Send + 'static) -> Ticket {
        // Cannot fail: the thread catches panics, and ends only when it is dropped.
        self.worker.submit(Box::new(job)).unwrap_or_default()
    }

    /// Waits until all jobs on the averages are done; files may still be being written.
    pub(in crate::tracker) fn wait(&self) {
        let _ = self.worker.wait_idle();
    }

    /// Waits until the values of all checkpoints have been read.
    pub(in crate::tracker) fn wait_for_reads(&self) {
        let _ = self.worker.wait(self.read);
    }

    /// Queues a job that gets the values of a checkpoint, and one that submits them to the writer.
    ///
    /// `get` returns none if it has stored them itself. Their memory goes to `copy_buffer` afterwards.
    pub(in crate::tracker) fn store(
        &mut self,
        meta: CheckpointMeta,
        copy_buffer: Option<CopyBuffer>,
        get: impl FnOnce(&CheckpointMeta) -> Result<Option<OwnedValues>, Failure> + Send + 'static,
    ) {
        let lost = self.lost.clone();
        let writer = self.writer.clone();
        let (send, receive) = channel();
        self.read = self.work(move || {
            // Set before the values are read and reset afterwards, so that a panic leaves it set.
            let before = lost.swap(meta.step(), Ordering::Relaxed);
            let values = get(&meta).map_err(Failure::into_error)?;
            lost.store(before, Ordering::Relaxed);
            let _ = send.send((meta, values));
            Ok(())
        });
        // A job of its own: the averages may change while the writer blocks it.
        self.work(move || match receive.recv() {
            Ok((meta, Some(values))) => {
                let recycle = copy_buffer.map(|buffer| buffer.recycle());
                writer.submit(CheckpointJob { meta, values, recycle })
            }
            // The values were stored already, or could not be read.
            Ok((_, None)) | Err(_) => Ok(()),
        });
    }
}

impl Pending for Background {
    fn take_error(&self) -> Option<Error> {
        lock(&self.error).take().or_else(|| self.writer.take_error())
    }

    fn flush(&self) -> Result<()> {
        self.wait();
        let written = self.writer.flush();
        let error = lock(&self.error).take();
        match (error, written) {
            (Some(error), Err(other)) => {
                tracing::error!("{other}");
                Err(error)
            }
            (error, written) => error.map_or(written, Err),
        }
    }

    fn wait_idle(&self) -> Result<()> {
        self.wait();
        self.writer.wait_idle()
    }

    fn last_failed_step(&self) -> Option<u64> {
        let lost = self.lost.load(Ordering::Relaxed);
        self.writer.last_failed_step().max((lost > 0).then_some(lost))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.worker.close()
            && let Some(error) = lock(&self.error).take()
        {
            tracing::error!("a background job failed: {error}");
        }
    }
}

/// Locks the error; nothing panics while it holds the lock.
fn lock(error: &Mutex<Option<Error>>) -> MutexGuard<'_, Option<Error>> {
    error.lock().unwrap_or_else(PoisonError::into_inner)
}
