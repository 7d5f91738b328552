//! Writing checkpoints in the background: one thread, one checkpoint after the other.
//!
//! Memory is bounded: while one checkpoint is written, or tried again, one more waits, and whoever comes with a third
//! waits himself. A checkpoint that failed is kept and tried once more when the next one comes, at [`Writer::flush`],
//! or at the end, and is then given up. Errors are kept until somebody asks.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::moment::{CheckpointMeta, Failure};
use super::values::OwnedValues;
use crate::error::{Error, Result};

/// A checkpoint to be written, with values of its own.
pub(super) struct Job {
    pub moment: CheckpointMeta,
    pub values: OwnedValues,
    /// Takes the values when the checkpoint is written or given up, so that their memory is used again.
    pub home: Option<Home>,
}

/// Where values go that are needed no longer.
pub(super) type Home = Box<dyn Fn(OwnedValues) + Send>;

impl Job {
    fn write(&self) -> Result<(), Failure> {
        self.moment.store(&self.values.as_values())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            home(std::mem::take(&mut self.values));
        }
    }
}

/// A thread that writes the checkpoints of one tracker, in the order in which they come.
///
/// Dropped, it writes what waits, and logs an error that nobody has asked for.
pub(super) struct Writer {
    dir: PathBuf,
    /// Taken when the writer is dropped, which ends the thread.
    line: Option<Line>,
    thread: Option<JoinHandle<()>>,
    outcome: Arc<Mutex<Outcome>>,
    /// Who started the thread: a forked child has none, and would wait for it for ever.
    process: u32,
}

/// The way to the thread. Every message is announced before it is sent, so that the thread can first try again what
/// failed while the message still takes the only place in the line.
struct Line {
    announce: Sender<()>,
    send: SyncSender<Message>,
}

enum Message {
    Write(Box<Job>),
    /// Answered when all that came before is written or given up.
    Flush(Sender<()>),
}

/// How it went so far.
#[derive(Default)]
struct Outcome {
    /// The first error that nobody has asked for, and the step of its checkpoint.
    unseen: Option<(u64, Error)>,
    last_failed_step: Option<u64>,
}

impl Writer {
    /// Starts the thread for the run in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] where the system has no thread left.
    pub(super) fn start(dir: &Path) -> Result<Writer> {
        Writer::start_with(dir, Job::write)
    }

    /// Starts a thread that writes by `write`.
    pub(super) fn start_with(
        dir: &Path,
        write: impl FnMut(&Job) -> Result<(), Failure> + Send + 'static,
    ) -> Result<Writer> {
        let outcome = Arc::new(Mutex::new(Outcome::default()));
        let mut work = Work { dir: dir.to_owned(), write, failed: None, outcome: outcome.clone() };
        let ((announce, announced), (send, messages)) = (channel(), sync_channel(1));
        // What the thread logs goes where the tracker's own messages go.
        let log = tracing::dispatcher::get_default(Clone::clone);
        let body = move || tracing::dispatcher::with_default(&log, || work.run(&announced, &messages));
        let thread = thread::Builder::new().name("posthoc-ema-writer".into()).spawn(body);
        let thread = thread.map_err(Error::io("start the thread that writes", dir))?;
        let (dir, line, process) = (dir.to_owned(), Some(Line { announce, send }), std::process::id());
        Ok(Writer { dir, line, thread: Some(thread), outcome, process })
    }

    /// Hands over a checkpoint; waits while another one waits.
    ///
    /// # Errors
    /// [`Error::Unexpected`] where the thread has ended, which only a fault of this crate can do.
    pub(super) fn submit(&self, job: Job) -> Result<()> {
        self.send(Message::Write(Box::new(job)))
    }

    /// Waits until all checkpoints are written or given up, and returns what [`Writer::take_error`] would. A checkpoint
    /// that failed before is tried once more.
    pub(super) fn flush(&self) -> Result<()> {
        self.wait_idle()?;
        self.take_error().map_or(Ok(()), Err)
    }

    /// Waits as [`Writer::flush`]; errors of checkpoints are kept for who asks.
    ///
    /// # Errors
    /// As [`Writer::submit`].
    pub(super) fn wait_idle(&self) -> Result<()> {
        let (done, wait) = channel();
        self.send(Message::Flush(done))?;
        wait.recv().map_err(|_| self.ended())
    }

    /// The first error that was not told yet, of a checkpoint that has not been written since.
    pub(super) fn take_error(&self) -> Option<Error> {
        lock(&self.outcome).unseen.take().map(|(_, error)| error)
    }

    /// The newest step whose checkpoint was given up and has not been written since.
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

/// What the thread works with.
struct Work<W> {
    dir: PathBuf,
    write: W,
    /// The last checkpoint, where it failed and may yet be written.
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
                    // Whoever asked may be gone; nobody else is to be told.
                    let _ = done.send(());
                }
                Err(_) => break,
            }
        }
        let failed = self.retry();
        self.keep_unseen(failed);
    }

    fn first(&mut self, job: Box<Job>) {
        let step = job.moment.step();
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

    /// Tries the last checkpoint once more if it failed, and returns its step and the error of this try.
    fn retry(&mut self) -> Option<(u64, Error)> {
        let job = self.failed.take()?;
        let step = job.moment.step();
        let Err(failure) = self.attempt(&job) else {
            lock(&self.outcome).written(step);
            return None;
        };
        let stored = matches!(failure, Failure::Removal(_));
        let error = failure.into_error();
        if stored {
            lock(&self.outcome).written(step);
            tracing::warn!("the snapshot of step {step} is stored, but: {error}");
        } else {
            lock(&self.outcome).last_failed_step = Some(step);
            tracing::warn!("the snapshot of step {step} is given up: {error}");
        }
        Some((step, error))
    }

    fn keep_unseen(&self, failed: Option<(u64, Error)>) {
        if let Some((step, error)) = failed {
            lock(&self.outcome).keep_unseen(step, error);
        }
    }

    /// Writes a checkpoint; a panic is an error of it, and the thread goes on.
    fn attempt(&mut self, job: &Job) -> Result<(), Failure> {
        // A write holds nothing from one checkpoint to the next that a panic could leave half done.
        let written = catch_unwind(AssertUnwindSafe(|| (self.write)(job)));
        written.unwrap_or_else(|panic| {
            let (step, why) = (job.moment.step(), text_of(&*panic));
            let reason =
                format!("the snapshot of step {step} was not stored, its writer panicked ({why}): report this");
            Err(Failure::Files(Error::unexpected(&self.dir, reason)))
        })
    }
}

impl Outcome {
    /// A checkpoint is on disk: an error of an earlier try no longer matters.
    fn written(&mut self, step: u64) {
        self.last_failed_step = self.last_failed_step.filter(|last_failed_step| *last_failed_step != step);
        if let Some((_, error)) = self.unseen.take_if(|(failed, _)| *failed == step) {
            tracing::warn!("the snapshot of step {step} was stored when it was tried again; before: {error}");
        }
    }

    fn keep_unseen(&mut self, step: u64, error: Error) {
        match &self.unseen {
            None => self.unseen = Some((step, error)),
            // The first error of a step is the one to be told; that of another step would be lost.
            Some((first, _)) if *first == step => {}
            Some(_) => tracing::warn!("the snapshot of step {step} was not stored: {error}"),
        }
    }
}

/// Nothing panics while it holds the lock, so what it guards is whole.
fn lock(outcome: &Mutex<Outcome>) -> MutexGuard<'_, Outcome> {
    outcome.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
