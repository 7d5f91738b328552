//! Timing in turns: every piece of work once, then every one again, so that what slows the machine slows all alike.

use std::time::Instant;

use super::{Measurement, Progress, Result, Work};

/// What a piece of work is, before it is timed.
pub(super) struct Row {
    pub name: String,
    pub work: Work,
    /// The bytes that have to be read and written, each once.
    pub bytes: u64,
    /// The name of the limit that it is compared with, a task of the same call of [`Session::measure`].
    pub limit: Option<String>,
}

impl Row {
    /// Something that the machine does at most.
    pub fn limit(name: impl Into<String>, bytes: usize) -> Row {
        Row { name: name.into(), work: Work::Limit, bytes: bytes as u64, limit: None }
    }
}

/// A piece of work on memory `S` that several share.
pub(super) trait Task<S> {
    /// What it is.
    fn row(&self) -> Row;

    /// Does it, whatever the memory holds, and compares the answer with another way to it.
    fn check(&self, state: &mut S) -> Result<()>;

    /// Does it once and returns the seconds that it took.
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

    /// Tells what is being done.
    pub fn progress(&mut self, what: &str, done: usize, of: usize) {
        (self.progress)(&Progress { what: format!("{}: {what}", self.device), done, of });
    }

    /// Checks every task, then times them in turns.
    pub fn measure<S>(&mut self, what: &str, state: &mut S, tasks: &[Box<dyn Task<S> + '_>]) -> Result<()> {
        self.progress(what, 0, self.repeats);
        tasks.iter().try_for_each(|task| task.check(state))?;
        let mut seconds = vec![Vec::with_capacity(self.repeats); tasks.len()];
        for round in 1..=self.repeats {
            for (task, seconds) in tasks.iter().zip(&mut seconds) {
                seconds.push(task.seconds(state)?);
            }
            self.progress(what, round, self.repeats);
        }
        let rows: Vec<Row> = tasks.iter().map(|task| task.row()).collect();
        let rate = |i: usize| rows[i].bytes as f64 / median(&seconds[i]);
        for (i, row) in rows.iter().enumerate() {
            let limit = row.limit.as_ref().and_then(|name| rows.iter().position(|row| row.name == *name));
            debug_assert_eq!(limit.is_some(), row.limit.is_some(), "a limit is timed beside what it limits");
            self.measurements.push(Measurement {
                device: self.device.clone(),
                name: row.name.clone(),
                work: row.work,
                bytes: row.bytes,
                seconds_median: median(&seconds[i]),
                seconds_all: seconds[i].clone(),
                bytes_per_second: rate(i),
                limit: row.limit.clone(),
                share_of_limit: limit.map(|limit| rate(i) / rate(limit)),
            });
        }
        Ok(())
    }
}

/// The seconds that something takes; never zero, whatever the clock's steps.
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

    /// Notes when it is run; takes the time that it is told to.
    struct Told(&'static str, Option<&'static str>, f64);

    impl Task<Vec<&'static str>> for Told {
        fn row(&self) -> Row {
            Row { name: self.0.into(), work: Work::Update, bytes: 100, limit: self.1.map(String::from) }
        }

        fn check(&self, state: &mut Vec<&'static str>) -> Result<()> {
            state.push("check");
            if self.2 > 0.0 { Ok(()) } else { Err(Error::Wrong { what: self.0.into(), reason: "no time".into() }) }
        }

        fn seconds(&self, state: &mut Vec<&'static str>) -> Result<f64> {
            state.push(self.0);
            Ok(self.2)
        }
    }

    #[test]
    fn tasks_are_checked_and_then_timed_in_turns() {
        let mut ignore = |_: &Progress| {};
        let mut session = Session::new("cpu".into(), 2, &mut ignore);
        let mut order = Vec::new();
        session
            .measure("all", &mut order, &[Box::new(Told("a", None, 1.0)), Box::new(Told("b", Some("a"), 4.0))])
            .unwrap();
        assert_eq!(order, ["check", "check", "a", "b", "a", "b"]);
        let rows = session.into_measurements();
        assert_eq!((rows[1].bytes_per_second, rows[1].share_of_limit), (25.0, Some(0.25)));
    }

    #[test]
    fn nothing_is_timed_after_a_wrong_answer() {
        let mut ignore = |_: &Progress| {};
        let mut session = Session::new("cpu".into(), 2, &mut ignore);
        let mut order = Vec::new();
        let error = session.measure("all", &mut order, &[Box::new(Told("a", None, 0.0))]).unwrap_err();
        assert!(matches!(error, Error::Wrong { .. }));
        assert_eq!(order, ["check"]);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
