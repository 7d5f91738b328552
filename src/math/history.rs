//! The times of a training's updates, run-length coded.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Most updates of a history; files that claim more are refused.
///
/// A solve over that many takes some gigabytes. Ten million steps with an update every ten steps are 1.5% of it.
pub(crate) const MAX_UPDATES: u64 = 1 << 26;

/// Number of newest runs that a new update may extend.
const OPEN_RUNS: usize = 4;

/// The times of all updates, as the union of runs `[first, last, stride]`.
///
/// Runs may interleave: updates every 7 steps, and at each snapshot every 100 steps, are two runs at any length of
/// training.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<[u64; 3]>", into = "Vec<[u64; 3]>")]
pub struct History {
    runs: Vec<RegularRun>,
}

/// Updates at a regular stride, in the sense of run-length coding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RegularRun {
    first: u64,
    last: u64,
    /// 1 while the run holds a single time.
    stride: u64,
}

impl RegularRun {
    fn count(self) -> u64 {
        (self.last - self.first) / self.stride + 1
    }

    fn times(self) -> impl Iterator<Item = u64> {
        (0..self.count()).map(move |i| self.first + i * self.stride)
    }

    /// Returns true if `time` is the next time of this run.
    fn is_extended_by(self, time: u64) -> bool {
        self.last.checked_add(self.stride) == Some(time)
    }

    /// Returns the part at or before `time`, if there is one.
    fn until(self, time: u64) -> Option<RegularRun> {
        let last = self.first + (time.min(self.last).checked_sub(self.first)?) / self.stride * self.stride;
        let stride = if last == self.first { 1 } else { self.stride };
        Some(RegularRun { last, stride, ..self })
    }
}

impl History {
    /// Creates a history of the given times.
    ///
    /// # Errors
    /// [`Error::History`] unless the times are above 0 and increase.
    pub fn from_times(times: impl IntoIterator<Item = u64>) -> Result<History> {
        let mut history = History::default();
        times.into_iter().try_for_each(|time| history.push(time))?;
        Ok(history)
    }

    /// Adds an update at `time`.
    ///
    /// # Errors
    /// [`Error::History`] unless `time` is later than the last update, or for more than 67 million updates.
    pub fn push(&mut self, time: u64) -> Result<()> {
        let last = self.last().unwrap_or(0);
        if time <= last {
            return Err(Error::History(format!(
                "an update at {time} cannot follow one at {last}: times must increase"
            )));
        }
        if self.runs.iter().map(|run| run.count()).sum::<u64>() >= MAX_UPDATES {
            let why = format!("a history holds at most {MAX_UPDATES} updates: update less often");
            return Err(Error::History(why));
        }
        let open = self.runs.len().saturating_sub(OPEN_RUNS);
        let runs = &mut self.runs[open..];
        let mut extended = false;
        // All runs whose stride leads to `time`, so that interleaved runs continue through the times they share.
        for run in runs.iter_mut().filter(|run| run.first != run.last && run.is_extended_by(time)) {
            run.last = time;
            extended = true;
        }
        if extended {
            return Ok(());
        }
        match runs.iter_mut().rfind(|run| run.first == run.last) {
            Some(run) => {
                run.stride = time - run.first;
                run.last = time;
            }
            None => self.runs.push(RegularRun { first: time, last: time, stride: 1 }),
        }
        Ok(())
    }

    /// Returns the time of the first update.
    pub fn first(&self) -> Option<u64> {
        self.runs.iter().map(|run| run.first).min()
    }

    /// Returns the time of the newest update.
    pub fn last(&self) -> Option<u64> {
        self.runs.iter().map(|run| run.last).max()
    }

    /// Returns true if there was no update yet.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Returns true if there was an update at `time`.
    pub fn contains(&self, time: u64) -> bool {
        self.runs.iter().any(|r| r.first <= time && time <= r.last && (time - r.first).is_multiple_of(r.stride))
    }

    /// Returns all times in increasing order.
    pub fn times(&self) -> Vec<u64> {
        let mut times: Vec<u64> = self.runs.iter().flat_map(|run| run.times()).collect();
        times.sort_unstable();
        times.dedup();
        times
    }

    /// Returns the updates at or before `time`.
    pub fn until(&self, time: u64) -> History {
        History { runs: self.runs.iter().filter_map(|run| run.until(time)).collect() }
    }

    /// Returns true if `later` begins with exactly these updates.
    pub fn is_prefix_of(&self, later: &History) -> bool {
        let Some(last) = self.last() else { return true };
        let until = later.until(last);
        // Equal runs are the common case and cost nothing. Different runs may still encode the same times.
        until == *self || until.times() == self.times()
    }
}

impl TryFrom<Vec<[u64; 3]>> for History {
    type Error = Error;

    fn try_from(runs: Vec<[u64; 3]>) -> Result<History> {
        let mut updates = 0u64;
        let mut history = History::default();
        for [first, last, stride] in runs {
            let invalid = |why: &str| Err(Error::History(format!("the run [{first}, {last}, {stride}] {why}")));
            if first == 0 || last < first || stride == 0 || !(last - first).is_multiple_of(stride) {
                return invalid("is not [first, last, stride] with 0 < first <= last in whole strides");
            }
            let run = RegularRun { first, last, stride: if first == last { 1 } else { stride } };
            updates = updates.saturating_add(run.count());
            if updates > MAX_UPDATES {
                return invalid(&format!("makes the history longer than {MAX_UPDATES} updates"));
            }
            history.runs.push(run);
        }
        Ok(history)
    }
}

impl From<History> for Vec<[u64; 3]> {
    fn from(history: History) -> Self {
        history.runs.iter().map(|run| [run.first, run.last, run.stride]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    fn coded(times: &[u64]) -> History {
        History::from_times(times.iter().copied()).unwrap()
    }

    #[test]
    fn regular_updates_make_one_run() {
        let times: Vec<u64> = (1..=100_000).map(|i| 10 * i).collect();
        let history = coded(&times);
        assert_eq!(Vec::from(history.clone()), [[10, 1_000_000, 10]]);
        assert_eq!(history.times(), times);
    }

    #[test]
    fn updates_at_snapshots_make_few_more_runs() {
        // Pairs one step apart look like new runs at first: the last case costs a run per snapshot.
        for (update, checkpoint, runs) in
            [(7, 100, 6), (300, 1000, 6), (1000, 300, 6), (10, 1000, 1), (3, 7, 6), (999, 1000, 50)]
        {
            let times: Vec<u64> = (1..=50_000).filter(|t| t % update == 0 || t % checkpoint == 0).collect();
            let history = coded(&times);
            assert_eq!(history.times(), times);
            assert!(history.runs.len() <= runs, "{update} {checkpoint}: {} runs", history.runs.len());
        }
    }

    #[test]
    fn random_times_survive_coding_and_prefixes_are_found() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for _ in 0..300 {
            let mut time = 0;
            let steps = [1, 2, 10, random.random_range(1..100)];
            let times: Vec<u64> = (0..random.random_range(1..80))
                .map(|_| {
                    time += steps[random.random_range(0..steps.len())];
                    time
                })
                .collect();
            let history = coded(&times);
            assert_eq!(history.times(), times);
            assert!((0..=time).all(|t| history.contains(t) == times.contains(&t)));
            let text = serde_json::to_string(&history).unwrap();
            assert_eq!(serde_json::from_str::<History>(&text).unwrap(), history);
            for n in 0..=times.len() {
                let prefix = coded(&times[..n]);
                assert!(prefix.is_prefix_of(&history));
                if n > 0 {
                    assert_eq!(history.until(times[n - 1]).times(), &times[..n]);
                    let mut other = times[..n].to_vec();
                    other[n - 1] += 1;
                    assert_eq!(coded(&other).is_prefix_of(&history), times.starts_with(&other));
                }
            }
        }
    }

    #[test]
    fn times_that_do_not_increase_are_an_error() {
        let mut history = coded(&[10, 20]);
        assert!(history.push(20).unwrap_err().to_string().contains("cannot follow one at 20"));
        assert!(coded(&[]).push(0).is_err());
    }

    #[test]
    fn invalid_stored_runs_are_an_error() {
        for text in ["[[0,10,1]]", "[[10,5,1]]", "[[1,10,0]]", "[[1,10,4]]", "[[1,18446744073709551615,1]]"] {
            assert!(serde_json::from_str::<History>(text).is_err(), "{text}");
        }
    }
}
