//! Timing in turns: each round times every task once, so that a slow phase of the machine slows all tasks alike.

use std::time::Instant;

use posthoc_ema::Result;

use super::{Measurement, Progress, Work};

/// Description of a task.
pub(super) struct TaskInfo {
    pub name: String,
    pub work: Work,
    /// Bytes to read and write, each counted once.
    pub bytes: u64,
    /// Name of the limit that the task is compared with, a task of the same call of [`Session::measure`].
    pub limit: Option<String>,
}

impl TaskInfo {
    /// Describes a limit of the machine.
    pub fn limit(name: impl Into<String>, bytes: usize) -> TaskInfo {
        TaskInfo { name: name.into(), work: Work::Limit, bytes: bytes as u64, limit: None }
    }
}

/// A piece of work on memory `S` that several tasks share.
pub(super) trait Task<S> {
    /// Describes the task.
    fn info(&self) -> TaskInfo;

    /// Does the work on memory with any contents, and compares the answer with a reference.
    fn check(&self, state: &mut S) -> Result<()>;

    /// Does the work once and returns the seconds that it took.
    fn seconds(&self, state: &mut S) -> Result<f64>;
}

/// The measurements of one device.
pub(super) struct Session<'a> {
    device: String,
    repeats: usize,
    progress: &'a mut dyn FnMut(&Progress),
    measurements: Vec<Measurement>,
}

impl<'a> Session<'a> {
    pub fn new(device: String, repeats: usize, progress: &'a mut dyn FnMut(&Progress)) -> Session<'a> {
        Session { device, repeats, progress, measurements: Vec::new() }
    }

    pub fn into_measurements(self) -> Vec<Measurement> {
        self.measurements
    }

    /// Reports the progress of a task.
    pub fn progress(&mut self, task: &str, done: usize, total: usize) {
        (self.progress)(&Progress { task: format!("{}: {task}", self.device), done, total });
    }

    /// Checks every task, then times them in turns.
    pub fn measure<S>(&mut self, name: &str, state: &mut S, tasks: &[Box<dyn Task<S> + '_>]) -> Result<()> {
        self.progress(name, 0, self.repeats);
        tasks.iter().try_for_each(|task| task.check(state))?;
        let mut seconds = vec![Vec::with_capacity(self.repeats); tasks.len()];
        for round in 1..=self.repeats {
            for (task, seconds) in tasks.iter().zip(&mut seconds) {
                seconds.push(task.seconds(state)?);
            }
            self.progress(name, round, self.repeats);
        }
        let rows: Vec<TaskInfo> = tasks.iter().map(|task| task.info()).collect();
        let rates: Vec<f64> = rows.iter().zip(&seconds).map(|(row, all)| row.bytes as f64 / median(all)).collect();
        for (i, row) in rows.iter().enumerate() {
            let limit = row.limit.as_ref().and_then(|name| rows.iter().position(|row| row.name == *name));
            debug_assert_eq!(limit.is_some(), row.limit.is_some(), "a task is timed beside its limit");
            self.measurements.push(Measurement {
                device: self.device.clone(),
                name: row.name.clone(),
                work: row.work,
                bytes: row.bytes,
                seconds_median: median(&seconds[i]),
                seconds_all: seconds[i].clone(),
                bytes_per_second: rates[i],
                limit: row.limit.clone(),
                share_of_limit: limit.map(|limit| rates[i] / rates[limit]),
            });
        }
        Ok(())
    }
}

/// Returns the seconds that some work takes: never zero, even if the clock has not ticked.
pub(super) fn timed(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64().max(1e-9)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], sorted[middle]) } else { sorted[middle] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use posthoc_ema::Error;

    /// A task that logs its calls and takes a given time.
    struct FakeTask {
        name: &'static str,
        limit: Option<&'static str>,
        seconds: f64,
    }

    impl Task<Vec<&'static str>> for FakeTask {
        fn info(&self) -> TaskInfo {
            TaskInfo { name: self.name.into(), work: Work::Update, bytes: 100, limit: self.limit.map(String::from) }
        }

        fn check(&self, state: &mut Vec<&'static str>) -> Result<()> {
            state.push("check");
            match self.seconds > 0.0 {
                true => Ok(()),
                false => Err(Error::Wrong { what: self.name.into(), reason: "no time".into() }),
            }
        }

        fn seconds(&self, state: &mut Vec<&'static str>) -> Result<f64> {
            state.push(self.name);
            Ok(self.seconds)
        }
    }

    #[test]
    fn tasks_are_checked_and_then_timed_in_turns() {
        let mut ignore = |_: &Progress| {};
        let mut session = Session::new("cpu".into(), 2, &mut ignore);
        let mut order = Vec::new();
        let limit = FakeTask { name: "a", limit: None, seconds: 1.0 };
        let work = FakeTask { name: "b", limit: Some("a"), seconds: 4.0 };
        session.measure("all", &mut order, &[Box::new(limit), Box::new(work)]).unwrap();
        assert_eq!(order, ["check", "check", "a", "b", "a", "b"]);
        let rows = session.into_measurements();
        assert_eq!((rows[1].bytes_per_second, rows[1].share_of_limit), (25.0, Some(0.25)));
    }

    #[test]
    fn wrong_answer_stops_before_timing() {
        let mut ignore = |_: &Progress| {};
        let mut session = Session::new("cpu".into(), 2, &mut ignore);
        let mut order = Vec::new();
        let wrong = FakeTask { name: "a", limit: None, seconds: 0.0 };
        let error = session.measure("all", &mut order, &[Box::new(wrong)]).unwrap_err();
        assert!(matches!(error, Error::Wrong { .. }));
        assert_eq!(order, ["check"]);
    }

    #[test]
    fn median_of_odd_and_even_counts() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
