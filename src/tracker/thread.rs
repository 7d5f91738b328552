//! Background thread that runs jobs one after the other.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::error::{Error, Result};

/// Work that a [`JobThread`] does.
pub(super) trait Runner<J>: Send + 'static {
    /// Runs a job, which takes a place in the queue until `slot` is dropped.
    fn run(&mut self, job: J, slot: QueueSlot<'_, J>);

    /// Called after the last job, before the thread ends.
    fn finish(&mut self) {}
}

/// Thread that runs jobs in the order of submission.
///
/// Dropping it runs the queued jobs and waits for the end.
pub(super) struct JobThread<J> {
    queue: Arc<ThreadQueue<J>>,
    thread: Option<JoinHandle<()>>,
    /// Process that started the thread. A forked child has no such thread and would wait for it forever.
    process: u32,
}

/// Number of a submitted job, for [`JobThread::wait`]; the default is finished already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// The thread has ended, which only a fault of this crate can cause.
#[derive(Debug)]
pub(super) struct Ended;

struct ThreadQueue<J> {
    /// Largest number of jobs that wait for the one that runs.
    capacity: usize,
    progress: Mutex<Progress<J>>,
    changed: Condvar,
}

struct Progress<J> {
    jobs: VecDeque<J>,
    /// Number of places in the queue that are taken.
    slots: usize,
    submitted: Ticket,
    finished: Ticket,
    /// True if no job follows.
    is_closed: bool,
    has_ended: bool,
}

/// Place of a job in the queue, freed when it is dropped.
pub(super) struct QueueSlot<'a, J>(&'a ThreadQueue<J>);

impl<J> Drop for QueueSlot<'_, J> {
    fn drop(&mut self) {
        self.0.lock().slots -= 1;
        self.0.changed.notify_all();
    }
}

impl<J> ThreadQueue<J> {
    /// Locks the progress; nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, Progress<J>> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while `condition` holds.
    fn wait_while(&self, mut condition: impl FnMut(&Progress<J>) -> bool) -> MutexGuard<'_, Progress<J>> {
        self.changed.wait_while(self.lock(), |progress| condition(progress)).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next job; none after the last one.
    fn next(&self) -> Option<J> {
        self.wait_while(|progress| progress.jobs.is_empty() && !progress.is_closed).jobs.pop_front()
    }

    fn run_all(&self, runner: &mut impl Runner<J>) {
        while let Some(job) = self.next() {
            runner.run(job, QueueSlot(self));
            self.lock().finished.0 += 1;
            self.changed.notify_all();
        }
        runner.finish();
    }
}

/// Guard that reports the end of the thread, also after a panic.
struct EndGuard<J>(Arc<ThreadQueue<J>>);

impl<J> Drop for EndGuard<J> {
    fn drop(&mut self) {
        self.0.lock().has_ended = true;
        self.0.changed.notify_all();
    }
}

impl<J: Send + 'static> JobThread<J> {
    /// Starts a thread for the run in `dir`, with room for `capacity` jobs beside the one that runs.
    ///
    /// # Errors
    /// [`Error::Io`] if the system cannot start a thread.
    pub(super) fn start(name: &str, dir: &Path, capacity: usize, mut runner: impl Runner<J>) -> Result<JobThread<J>> {
        let progress = Progress {
            jobs: VecDeque::new(),
            slots: 0,
            submitted: Ticket::default(),
            finished: Ticket::default(),
            is_closed: false,
            has_ended: false,
        };
        let queue = Arc::new(ThreadQueue { capacity, progress: Mutex::new(progress), changed: Condvar::new() });
        let end = EndGuard(queue.clone());
        // The thread logs to the same subscriber as the tracker.
        let log = tracing::dispatcher::get_default(Clone::clone);
        let body = move || tracing::dispatcher::with_default(&log, || end.0.run_all(&mut runner));
        let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
        let thread = thread.map_err(Error::io("start a background thread for", dir))?;
        Ok(JobThread { queue, thread: Some(thread), process: std::process::id() })
    }
}

impl<J> JobThread<J> {
    /// Queues a job; blocks while the queue is full.
    pub(super) fn submit(&self, job: J) -> Result<Ticket, Ended> {
        let capacity = self.queue.capacity;
        let mut progress = self.queue.wait_while(|progress| progress.slots >= capacity && !progress.has_ended);
        if progress.has_ended {
            return Err(Ended);
        }
        progress.jobs.push_back(job);
        progress.slots += 1;
        progress.submitted.0 += 1;
        self.queue.changed.notify_all();
        Ok(progress.submitted)
    }

    /// Waits until a job and all before it have run.
    pub(super) fn wait(&self, ticket: Ticket) -> Result<(), Ended> {
        let progress = self.queue.wait_while(|progress| progress.finished < ticket && !progress.has_ended);
        if progress.finished < ticket { Err(Ended) } else { Ok(()) }
    }

    /// Waits until all jobs submitted so far have run.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn wait_idle(&self) -> Result<(), Ended> {
        let submitted = self.queue.lock().submitted;
        self.wait(submitted)
    }

    /// Runs the queued jobs and ends the thread. Returns false in a forked child, which has no such thread.
    pub(super) fn close(&mut self) -> bool {
        if self.process != std::process::id() {
            // In a child, neither the thread nor a lock that it held at the fork can be waited for.
            std::mem::forget(self.thread.take());
            return false;
        }
        if let Some(thread) = self.thread.take() {
            self.queue.lock().is_closed = true;
            self.queue.changed.notify_all();
            if let Err(panic) = thread.join() {
                tracing::error!("a background thread panicked ({}); please report this", panic_text(&*panic));
            }
        }
        true
    }
}

impl<J> Drop for JobThread<J> {
    fn drop(&mut self) {
        self.close();
    }
}

/// Runs `work` and returns the text of a panic as an error.
///
/// `work` must keep no state that a panic could leave inconsistent.
pub(super) fn catch_panic<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| panic_text(&*panic).to_owned())
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::*;

    /// Runner that sends each job's number, and waits for the test before it frees the job's place and before it ends.
    struct Echo {
        started: Sender<u32>,
        proceeds: Receiver<()>,
    }

    impl Runner<u32> for Echo {
        fn run(&mut self, job: u32, slot: QueueSlot<'_, u32>) {
            self.started.send(job).unwrap();
            self.proceeds.recv().unwrap();
            drop(slot);
            self.proceeds.recv().unwrap();
        }

        fn finish(&mut self) {
            let _ = self.started.send(u32::MAX);
        }
    }

    fn start(capacity: usize) -> (JobThread<u32>, Receiver<u32>, Sender<()>) {
        let (started, starts) = channel();
        let (proceed, proceeds) = channel();
        let thread = JobThread::start("test", Path::new("run"), capacity, Echo { started, proceeds }).unwrap();
        (thread, starts, proceed)
    }

    #[test]
    fn wait_idle_returns_after_all_jobs_in_order() {
        let (thread, starts, proceed) = start(usize::MAX);
        for i in 0..100 {
            thread.submit(i).unwrap();
            proceed.send(()).unwrap();
            proceed.send(()).unwrap();
        }
        thread.wait_idle().unwrap();
        assert_eq!(starts.try_iter().collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn wait_does_not_wait_for_later_jobs() {
        let (thread, _starts, proceed) = start(usize::MAX);
        let first = thread.submit(1).unwrap();
        let second = thread.submit(2).unwrap();
        (0..2).for_each(|_| proceed.send(()).unwrap());
        thread.wait(first).unwrap();
        (0..2).for_each(|_| proceed.send(()).unwrap());
        thread.wait(second).unwrap();
        thread.wait(Ticket::default()).unwrap();
    }

    #[test]
    fn submit_blocks_until_the_place_is_free() {
        let (thread, starts, proceed) = start(1);
        thread.submit(1).unwrap();
        assert_eq!(starts.recv().unwrap(), 1);
        let (done, is_done) = channel();
        std::thread::scope(|scope| {
            // If an assertion fails, dropping `proceed` lets the threads go on, and the test fails instead of hanging.
            let thread = &thread;
            let proceed = proceed;
            scope.spawn(move || {
                thread.submit(2).unwrap();
                done.send(()).unwrap();
            });
            assert!(is_done.recv_timeout(Duration::from_millis(50)).is_err());
            proceed.send(()).unwrap();
            is_done.recv().unwrap();
            (0..3).for_each(|_| proceed.send(()).unwrap());
            thread.wait_idle().unwrap();
        });
    }

    #[test]
    fn drop_runs_queued_jobs() {
        let (thread, starts, proceed) = start(usize::MAX);
        (0..4).for_each(|_| proceed.send(()).unwrap());
        thread.submit(1).unwrap();
        thread.submit(2).unwrap();
        drop(thread);
        assert_eq!(starts.try_iter().collect::<Vec<_>>(), [1, 2, u32::MAX]);
    }

    #[test]
    fn ended_thread_is_an_error_instead_of_a_hang() {
        let (thread, _starts, proceed) = start(1);
        drop(proceed);
        let ticket = thread.submit(1).unwrap();
        assert!(thread.wait(ticket).is_err());
        assert!(thread.submit(2).is_err());
    }

    #[test]
    fn panics_are_caught_with_their_text() {
        assert_eq!(catch_panic(|| 3), Ok(3));
        let number = 3;
        assert_eq!(catch_panic::<()>(|| panic!("in job {number}")), Err("in job 3".to_owned()));
        assert_eq!(catch_panic::<()>(|| panic!("on purpose")), Err("on purpose".to_owned()));
    }
}
