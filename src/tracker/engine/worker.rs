//! Thread that runs an engine's jobs in order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::error::{Error, Result};

type Job = Box<dyn FnOnce() -> Result<()> + Send>;

/// Thread that runs jobs in order and keeps the first error.
///
/// Dropping it runs the queued jobs, and logs an error that no call has returned.
pub(super) struct Worker {
    send: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    waiting: usize,
    error: Option<Error>,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn done(&self, outcome: Result<()>) {
        let mut progress = self.lock();
        progress.waiting -= 1;
        if let Err(error) = outcome {
            progress.error.get_or_insert(error);
        }
        self.changed.notify_all();
    }
}

impl Worker {
    /// Starts the thread for the run in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] if the system cannot start a thread.
    pub(super) fn start(dir: &Path) -> Result<Worker> {
        let state = Arc::new(State::default());
        let (send, jobs) = channel::<Job>();
        let log = tracing::dispatcher::get_default(Clone::clone);
        let (shared, place) = (state.clone(), dir.to_owned());
        let run = move || {
            for job in jobs {
                let outcome = catch_unwind(AssertUnwindSafe(job));
                let panicked =
                    || Error::unexpected(&place, "the thread that works on the averages panicked: resume the run");
                shared.done(outcome.unwrap_or_else(|_| Err(panicked())));
            }
        };
        let body = move || tracing::dispatcher::with_default(&log, run);
        let thread = thread::Builder::new().name("posthoc-ema-worker".into()).spawn(body);
        let thread = thread.map_err(Error::io("start the thread that works on the averages", dir))?;
        Ok(Worker { send: Some(send), thread: Some(thread), state })
    }

    /// Queues a job.
    pub(super) fn submit(&self, job: impl FnOnce() -> Result<()> + Send + 'static) {
        self.state.lock().waiting += 1;
        // Cannot fail: the thread ends only when the sender is dropped.
        if let Some(send) = &self.send {
            let _ = send.send(Box::new(job));
        }
    }

    /// Waits until all jobs are done.
    pub(super) fn wait(&self) {
        let mut progress = self.state.lock();
        while progress.waiting > 0 {
            progress = self.state.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the first unreported error.
    pub(super) fn take_error(&self) -> Option<Error> {
        self.state.lock().error.take()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.send = None;
        if let Some(thread) = self.thread.take() {
            // Cannot fail: the loop catches the panics of jobs.
            let _ = thread.join();
        }
        if let Some(error) = self.take_error() {
            tracing::error!("a background job failed: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn wait_returns_after_all_jobs_in_order() {
        let worker = Worker::start(Path::new("run")).unwrap();
        let (send, receive) = mpsc::channel();
        for i in 0..100 {
            let send = send.clone();
            worker.submit(move || send.send(i).map_err(|_| Error::Internal("gone".into())));
        }
        worker.wait();
        assert_eq!(receive.try_iter().collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
        assert!(worker.take_error().is_none());
    }

    #[test]
    fn first_error_or_panic_is_returned_once() {
        let worker = Worker::start(Path::new("run")).unwrap();
        worker.submit(|| Err(Error::Internal("first".into())));
        worker.submit(|| Err(Error::Internal("second".into())));
        worker.wait();
        assert!(worker.take_error().unwrap().to_string().contains("first"));
        assert!(worker.take_error().is_none());
        worker.submit(|| panic!("on purpose"));
        worker.wait();
        assert!(worker.take_error().unwrap().to_string().contains("panicked"));
    }

    #[test]
    fn drop_runs_queued_jobs() {
        let (send, receive) = mpsc::channel();
        let worker = Worker::start(Path::new("run")).unwrap();
        worker.submit(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            send.send(()).map_err(|_| Error::Internal("gone".into()))
        });
        drop(worker);
        assert!(receive.try_recv().is_ok());
    }
}
