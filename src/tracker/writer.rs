//! Background thread that writes checkpoints one after the other.
//!
//! Memory is bounded: while one checkpoint is written, or tried again, one more is queued, and a third submission
//! blocks. A failed checkpoint is tried once more when the next one comes, at [`Writer::flush`], or at the end, and is
//! then given up. Errors are kept until the tracker takes them.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::checkpoint_meta::{CheckpointMeta, Failure};
use super::values::OwnedValues;
use crate::error::{Error, Result};

/// Checkpoint to be written, with its own copy of the values.
pub(super) struct Job {
    pub meta: CheckpointMeta,
    pub values: OwnedValues,
    /// Receives the values after the checkpoint is written or given up, so that their memory is reused.
    pub recycle: Option<Recycle>,
}

/// Callback that takes back the memory of values.
pub(super) type Recycle = Box<dyn Fn(OwnedValues) + Send>;

impl Job {
    fn write(&self) -> Result<(), Failure> {
        self.meta.store(&self.values.as_values())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(recycle) = &self.recycle {
            recycle(std::mem::take(&mut self.values));
        }
    }
}

/// Thread that writes the checkpoints of one tracker, in the order of submission.
///
/// Dropping it writes the queued checkpoints, and logs an error that no call has returned.
pub(super) struct Writer {
    dir: PathBuf,
    /// Taken when the writer is dropped, to end the thread.
    line: Option<Line>,
    thread: Option<JoinHandle<()>>,
    outcome: Arc<Mutex<Outcome>>,
    /// Process that started the thread. A forked child has no such thread and would wait for it forever.
    process: u32,
}

/// Channel to the thread.
///
/// Every message is announced before it is sent, so that the thread can retry a failed checkpoint while the message
/// still takes the only place in the queue.
struct Line {
    announce: Sender<()>,
    send: SyncSender<Message>,
}

enum Message {
    Write(Box<Job>),
    /// Answered after all earlier checkpoints are written or given up.
    Flush(Sender<()>),
}

/// Result of the checkpoints so far.
#[derive(Default)]
struct Outcome {
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
        Writer::start_with(dir, Job::write)
    }

    /// Starts a thread that writes with `write`.
    pub(super) fn start_with(
        dir: &Path,
        write: impl FnMut(&Job) -> Result<(), Failure> + Send + 'static,
    ) -> Result<Writer> {
        let outcome = Arc::new(Mutex::new(Outcome::default()));
        let mut work = Work { dir: dir.to_owned(), write, failed: None, outcome: outcome.clone() };
        let ((announce, announced), (send, messages)) = (channel(), sync_channel(1));
        // The thread logs to the same subscriber as the tracker.
        let log = tracing::dispatcher::get_default(Clone::clone);
        let body = move || tracing::dispatcher::with_default(&log, || work.run(&announced, &messages));
        let thread = thread::Builder::new().name("posthoc-ema-writer".into()).spawn(body);
        let thread = thread.map_err(Error::io("start the thread that writes", dir))?;
        let (dir, line, process) = (dir.to_owned(), Some(Line { announce, send }), std::process::id());
        Ok(Writer { dir, line, thread: Some(thread), outcome, process })
    }

    /// Queues a checkpoint; blocks while another one is queued.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the thread has ended, which only a fault of this crate can cause.
    pub(super) fn submit(&self, job: Job) -> Result<()> {
        self.send(Message::Write(Box::new(job)))
    }

    /// Waits until all checkpoints are written or given up, after a second try of one that failed.
    ///
    /// # Errors
    /// The error of [`Writer::take_error`], and those of [`Writer::submit`].
    pub(super) fn flush(&self) -> Result<()> {
        self.wait_idle()?;
        self.take_error().map_or(Ok(()), Err)
    }

    /// Waits like [`Writer::flush`], but keeps the errors of checkpoints.
    ///
    /// # Errors
    /// Those of [`Writer::submit`].
    pub(super) fn wait_idle(&self) -> Result<()> {
        let (done, wait) = channel();
        self.send(Message::Flush(done))?;
        wait.recv().map_err(|_| self.ended())
    }

    /// Takes the first unreported error of a checkpoint that has not been written since.
    pub(super) fn take_error(&self) -> Option<Error> {
        lock(&self.outcome).unseen.take().map(|(_, error)| error)
    }

    /// Returns the newest step whose checkpoint was given up and has not been written since.
    pub(super) fn last_failed_step(&self) -> Option<u64> {
        lock(&self.outcome).last_failed_step
    }

    fn send(&self, message: Message) -> Result<()> {
        let line = self.line.as_ref().ok_or_else(|| self.ended())?;
        line.announce.send(()).map_err(|_| self.ended())?;
        line.send.send(message).map_err(|_| self.ended())
    }

    fn ended(&self) -> Error {
        Error::unexpected(&self.dir, "the thread that writes snapshots has ended: start again and resume the run")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            std::mem::forget((self.line.take(), self.thread.take()));
            return;
        }
        self.line = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("{}: the thread that writes snapshots panicked", self.dir.display());
        }
        if let Some(error) = self.take_error() {
            tracing::error!("{}: a snapshot was not stored: {error}", self.dir.display());
        }
    }
}

/// State of the thread.
struct Work<W> {
    dir: PathBuf,
    write: W,
    /// Last checkpoint, if it failed and may be tried again.
    failed: Option<Box<Job>>,
    outcome: Arc<Mutex<Outcome>>,
}

impl<W: FnMut(&Job) -> Result<(), Failure>> Work<W> {
    fn run(&mut self, announced: &Receiver<()>, messages: &Receiver<Message>) {
        while announced.recv().is_ok() {
            let failed = self.retry();
            match messages.recv() {
                Ok(Message::Write(job)) => self.first(job),
                Ok(Message::Flush(done)) => {
                    self.keep_unseen(failed);
                    // The receiver may have been dropped.
                    let _ = done.send(());
                }
                Err(_) => break,
            }
        }
        let failed = self.retry();
        self.keep_unseen(failed);
    }

    fn first(&mut self, job: Box<Job>) {
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
        let Err(failure) = self.attempt(&job) else {
            lock(&self.outcome).written(step);
            return None;
        };
        let stored = matches!(failure, Failure::Removal(_));
        let error = failure.into_error();
        if stored {
            lock(&self.outcome).written(step);
            tracing::warn!(
                "the snapshot of step {step} is stored, but surplus snapshots could not be removed: {error}"
            );
        } else {
            lock(&self.outcome).last_failed_step = Some(step);
            tracing::warn!("giving up the snapshot of step {step} after two tries: {error}");
        }
        Some((step, error))
    }

    fn keep_unseen(&self, failed: Option<(u64, Error)>) {
        if let Some((step, error)) = failed {
            lock(&self.outcome).keep_unseen(step, error);
        }
    }

    /// Writes a checkpoint. A panic becomes an error, and the thread goes on.
    fn attempt(&mut self, job: &Job) -> Result<(), Failure> {
        // Unwind safe: a write keeps no state from one checkpoint to the next.
        let written = catch_unwind(AssertUnwindSafe(|| (self.write)(job)));
        written.unwrap_or_else(|panic| {
            let (step, why) = (job.meta.step(), text_of(&*panic));
            let reason =
                format!("the snapshot of step {step} was not stored: its writer panicked ({why}); please report this");
            Err(Failure::Files(Error::unexpected(&self.dir, reason)))
        })
    }
}

impl Outcome {
    /// Records that a checkpoint is on disk: the error of an earlier try no longer matters.
    fn written(&mut self, step: u64) {
        self.last_failed_step = self.last_failed_step.filter(|last_failed_step| *last_failed_step != step);
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
fn lock(outcome: &Mutex<Outcome>) -> MutexGuard<'_, Outcome> {
    outcome.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
