//! Evaluations of a batch: one after the other, or side by side.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use super::candidates::Candidate;
use super::scores::Scores;
use crate::error::{Error, Result};

/// Evaluation of a batch.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    /// Candidate, for job 0.
    pub candidate: Candidate<'a>,
    /// Index of the candidate within its batch.
    pub index: usize,
}

/// BatchProgress of a task, by its index.
pub(super) enum TaskEvent {
    /// Its evaluation begins.
    Started(usize),
    /// Its evaluation ended, after a number of seconds.
    Ended(usize, Result<Scores, String>, f64),
    /// It is left out, because an earlier repeat of its candidate failed.
    Skipped(usize),
}

/// Tasks of a batch that have ended. They are announced in order, whatever order they end in.
pub(super) struct BatchProgress {
    /// Number of tasks of each candidate that have not ended.
    open: Vec<usize>,
    /// True for a task that is skipped; `None` until a task ends.
    skipped: Vec<Option<bool>>,
    announced: usize,
}

impl BatchProgress {
    pub(super) fn new(tasks: &[Task<'_>]) -> BatchProgress {
        let mut open = vec![0; tasks.iter().map(|task| task.index + 1).max().unwrap_or(0)];
        tasks.iter().for_each(|task| open[task.index] += 1);
        BatchProgress { open, skipped: vec![None; tasks.len()], announced: 0 }
    }

    /// Notes the end of a task. Returns true for the last one of its candidate.
    pub(super) fn end(&mut self, task: usize, index: usize, is_skipped: bool) -> bool {
        self.skipped[task] = Some(is_skipped);
        self.open[index] -= 1;
        self.open[index] == 0
    }

    /// Returns the next task to announce, if all before it have ended.
    pub(super) fn next_to_announce(&mut self) -> Option<usize> {
        loop {
            let is_skipped = (*self.skipped.get(self.announced)?)?;
            self.announced += 1;
            if !is_skipped {
                return Some(self.announced - 1);
            }
        }
    }
}

/// Evaluates the tasks of a batch, and reports what happens to each. An error of `report` ends it.
pub(super) trait Evaluator {
    fn run(&mut self, tasks: &[Task<'_>], report: &mut dyn FnMut(TaskEvent) -> Result<()>) -> Result<()>;
}

/// Evaluates one task after the other.
pub(super) struct Serial<F>(pub F);

/// Evaluates tasks side by side, on a number of threads.
pub(super) struct Parallel<F>(pub F, pub u32);

fn evaluate<S: Into<Scores>, E: Display>(call: impl FnOnce() -> Result<S, E>) -> (Result<Scores, String>, f64) {
    let start = Instant::now();
    let scores = call().map(Into::into).map_err(|error| error.to_string());
    (scores, start.elapsed().as_secs_f64())
}

impl<F, S: Into<Scores>, E: Display> Evaluator for Serial<F>
where
    F: FnMut(&Candidate<'_>) -> Result<S, E>,
{
    fn run(&mut self, tasks: &[Task<'_>], report: &mut dyn FnMut(TaskEvent) -> Result<()>) -> Result<()> {
        let mut failed = None;
        for (i, task) in tasks.iter().enumerate() {
            if failed == Some(task.index) {
                report(TaskEvent::Skipped(i))?;
                continue;
            }
            report(TaskEvent::Started(i))?;
            let (scores, seconds) = evaluate(|| (self.0)(&task.candidate));
            failed = if scores.is_err() { Some(task.index) } else { None };
            report(TaskEvent::Ended(i, scores, seconds))?;
        }
        Ok(())
    }
}

impl<F, S: Into<Scores>, E: Display> Evaluator for Parallel<F>
where
    F: Fn(&Candidate<'_>) -> Result<S, E> + Sync,
{
    fn run(&mut self, tasks: &[Task<'_>], report: &mut dyn FnMut(TaskEvent) -> Result<()>) -> Result<()> {
        let Parallel(function, jobs) = self;
        let function = &*function;
        let waiting: Mutex<VecDeque<usize>> = Mutex::new((0..tasks.len()).collect());
        let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let failed: Vec<AtomicBool> = tasks.iter().map(|_| AtomicBool::new(false)).collect();
        let work = |job: u32, sender: mpsc::Sender<TaskEvent>| {
            while let Some(i) = next() {
                let Task { candidate, index } = tasks[i];
                if failed[index].load(Ordering::Relaxed) {
                    let _ = sender.send(TaskEvent::Skipped(i));
                    continue;
                }
                let _ = sender.send(TaskEvent::Started(i));
                let (scores, seconds) = evaluate(|| function(&Candidate { job, ..candidate }));
                failed[index].fetch_or(scores.is_err(), Ordering::Relaxed);
                let _ = sender.send(TaskEvent::Ended(i, scores, seconds));
            }
        };
        thread::scope(|scope| {
            let (sender, events) = mpsc::channel();
            for job in 0..(*jobs).min(u32::try_from(tasks.len()).unwrap_or(u32::MAX)) {
                let (sender, work) = (sender.clone(), &work);
                let started = thread::Builder::new().spawn_scoped(scope, move || work(job, sender));
                started.map_err(|source| Error::Threads { source })?;
            }
            drop(sender);
            // The events end with the last thread.
            let result = events.iter().try_for_each(&mut *report);
            waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
            result
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Barrier;

    use super::*;
    use crate::math::Profile;
    use crate::planning::{NoPrediction, Plan};

    /// Ten candidates of two repeats each, of which the fourth fails.
    fn events(evaluator: &mut dyn Evaluator, stop_after: usize) -> (Vec<String>, Vec<usize>, bool) {
        let plan = Plan {
            profile: Profile::sigma_rel(0.1).unwrap(),
            at: 1,
            relative_error: 0.0,
            noise_gain: 1.0,
            condition: 1.0,
            sum: 1.0,
            rho: 0.0,
            predicted: None,
            no_prediction: Some(NoPrediction::NotAsked),
            event: None,
            worst_group: None,
            held_back: None,
            shortfall: None,
            weights: Vec::new(),
            later: Vec::new(),
            groups: std::collections::BTreeMap::new(),
        };
        let paths: Vec<String> = (0..10).map(|i| format!("{i}")).collect();
        let candidate =
            |i: usize, repeat| Candidate { plan: &plan, path: Path::new(&paths[i]), with: None, repeat, job: 0 };
        let tasks: Vec<Task<'_>> =
            (0..20).map(|i| Task { candidate: candidate(i / 2, 1 + (i % 2) as u32), index: i / 2 }).collect();
        let mut progress = BatchProgress::new(&tasks);
        let (mut ended, mut announced, mut count) = (Vec::new(), Vec::new(), 0);
        let result = evaluator.run(&tasks, &mut |event| {
            let (i, is_skipped) = match event {
                TaskEvent::Started(_) => return Ok(()),
                TaskEvent::Ended(i, _, _) => (i, false),
                TaskEvent::Skipped(i) => (i, true),
            };
            count += 1;
            progress.end(i, tasks[i].index, is_skipped);
            announced.extend(std::iter::from_fn(|| progress.next_to_announce()));
            ended.push(format!("{i}{}", if is_skipped { " skipped" } else { "" }));
            if count == stop_after { Err(Error::NoTarget) } else { Ok(()) }
        });
        (ended, announced, result.is_ok())
    }

    fn score(candidate: &Candidate<'_>) -> Result<f64, String> {
        if candidate.path == Path::new("3") { Err("no".into()) } else { Ok(1.0) }
    }

    #[test]
    fn events_of_jobs_are_announced_in_order() {
        let (ended, announced, _) = events(&mut Serial(score), 99);
        assert!(ended.contains(&"7 skipped".into()) && ended.len() == 20);
        let all: Vec<usize> = (0..20).filter(|i| *i != 7).collect();
        assert_eq!(announced, all);
        for jobs in [1, 2, 5, 100] {
            let (mut ended, announced, is_ok) = events(&mut Parallel(score, jobs), 99);
            ended.sort_unstable();
            ended.dedup();
            assert!(ended.len() == 20 && is_ok && announced.is_sorted());
            assert!(announced.iter().filter(|i| **i != 7).eq(&all), "{announced:?}");
        }
    }

    #[test]
    fn evaluations_wait_for_each_other_only_if_there_are_as_many_jobs() {
        let barrier = Barrier::new(4);
        let meet = |_: &Candidate<'_>| {
            barrier.wait();
            Ok::<f64, String>(0.0)
        };
        assert_eq!(events(&mut Parallel(meet, 4), 99).1.len(), 20);
    }

    /// Evaluations that run already end, and no further one begins.
    #[test]
    fn error_of_a_report_ends_the_batch() {
        let (ended, _, is_ok) = events(&mut Serial(score), 3);
        assert!(ended.len() == 3 && !is_ok);
        let (ended, _, is_ok) = events(&mut Parallel(score, 2), 3);
        assert!(ended.len() == 3 && !is_ok);
    }
}
