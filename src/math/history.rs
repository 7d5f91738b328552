//! The times of a training's updates, run-length coded.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

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
pub(super) struct RegularRun {
    pub first: u64,
    pub last: u64,
    /// 1 while the run holds a single time.
    pub stride: u64,
}

impl RegularRun {
    /// Returns the number of updates. It fits, because times start at 1.
    pub(super) fn count(self) -> u64 {
        (self.last - self.first) / self.stride + 1
    }

    /// Returns the number of updates at or before `time`.
    pub(super) fn count_until(self, time: u64) -> u64 {
        self.until(time).map_or(0, RegularRun::count)
    }

    /// Returns the time of the newest update at or before `time`.
    pub(super) fn last_until(self, time: u64) -> Option<u64> {
        self.until(time).map(|run| run.last)
    }

    /// Returns the first update at or after `time`.
    fn next_from(self, time: u64) -> Option<u64> {
        let next =
            self.first.checked_add(time.saturating_sub(self.first).div_ceil(self.stride).checked_mul(self.stride)?)?;
        (next <= self.last).then_some(next)
    }

    fn times(self) -> impl Iterator<Item = u64> {
        (0..self.count()).map(move |i| self.first + i * self.stride)
    }

    /// Returns true if `time` is the next time of this run.
    fn is_extended_by(self, time: u64) -> bool {
        self.last.checked_add(self.stride) == Some(time)
    }

    /// Returns the part after `time`, if there is one.
    fn after(self, time: u64) -> Option<RegularRun> {
        let first = self.next_from(time.checked_add(1)?)?;
        let stride = if first == self.last { 1 } else { self.stride };
        Some(RegularRun { first, stride, ..self })
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
    /// [`Error::History`] unless `time` is later than the last update.
    pub fn push(&mut self, time: u64) -> Result<()> {
        let last = self.last().unwrap_or(0);
        if time <= last {
            return Err(Error::History(format!(
                "an update at {time} cannot follow one at {last}: times must increase"
            )));
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

    /// Returns the runs whose union the history is.
    pub(super) fn runs(&self) -> &[RegularRun] {
        &self.runs
    }

    /// Returns a history of the union of runs.
    pub(super) fn from_runs(runs: Vec<RegularRun>) -> History {
        History { runs }
    }

    /// Returns all times in increasing order. Takes 8 bytes per update.
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

    /// Returns an update at `time` and those after it.
    pub(crate) fn since(&self, time: u64) -> History {
        let mut runs = vec![RegularRun { first: time, last: time, stride: 1 }];
        let after = |run: &RegularRun| run.after(time);
        runs.extend(self.runs.iter().filter_map(after));
        History { runs }
    }

    /// Returns true if `later` begins with exactly these updates.
    pub fn is_prefix_of(&self, later: &History) -> bool {
        let Some(last) = self.last() else { return true };
        let until = later.runs.iter().filter_map(|run| run.until(last));
        // Equal runs are the common case and cost nothing. Different runs may still encode the same times.
        until.clone().eq(self.runs.iter().copied()) || same_times(&until.collect::<Vec<_>>(), &self.runs)
    }
}

impl TryFrom<Vec<[u64; 3]>> for History {
    type Error = Error;

    fn try_from(runs: Vec<[u64; 3]>) -> Result<History> {
        let mut history = History::default();
        for [first, last, stride] in runs {
            let invalid = |why: &str| Err(Error::History(format!("the run [{first}, {last}, {stride}] {why}")));
            if first == 0 || last < first || stride == 0 || !(last - first).is_multiple_of(stride) {
                return invalid("is not [first, last, stride] with 0 < first <= last in whole strides");
            }
            let run = RegularRun { first, last, stride: if first == last { 1 } else { stride } };
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

/// Most updates that [`same_times`] compares one by one.
const MAX_COMPARED: u64 = 1 << 24;

/// Returns true if two unions of runs hold the same times.
///
/// The time axis is cut at the ends of all runs. Between two cuts both sides repeat with the least common multiple of
/// their strides, so one period is compared. Runs whose period is too long to be compared count as different: a
/// tracker writes none.
fn same_times(a: &[RegularRun], b: &[RegularRun]) -> bool {
    let mut cuts: Vec<u64> = a.iter().chain(b).flat_map(|run| [run.first, run.last.saturating_add(1)]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut a = ActiveRuns::new(a);
    let mut b = ActiveRuns::new(b);
    let mut compared = 0;
    cuts.windows(2).all(|cut| {
        a.advance(cut[0]);
        b.advance(cut[0]);
        a.equals(&b, cut[0], cut[1], &mut compared)
    })
}

/// The runs that a point of the time axis is within.
struct ActiveRuns {
    /// Runs that begin later, the earliest at the end.
    later: Vec<RegularRun>,
    active: Vec<RegularRun>,
}

impl ActiveRuns {
    fn new(runs: &[RegularRun]) -> ActiveRuns {
        let mut later = runs.to_vec();
        later.sort_unstable_by_key(|run| std::cmp::Reverse(run.first));
        ActiveRuns { later, active: Vec::new() }
    }

    /// Moves on to `time`.
    fn advance(&mut self, time: u64) {
        self.active.retain(|run| run.last >= time);
        while let Some(run) = self.later.pop_if(|run| run.first <= time) {
            self.active.push(run);
        }
    }

    /// Returns true if both hold the same times in `[from, to)`, within which no run begins or ends.
    fn equals(&self, other: &ActiveRuns, from: u64, to: u64, compared: &mut u64) -> bool {
        let runs = || self.active.iter().chain(&other.active);
        let end = match runs().try_fold(1, |period, run| least_common_multiple(period, run.stride)) {
            Some(period) => to.min(from.saturating_add(period)),
            None => to,
        };
        let mut time = from;
        while let (Some(own), Some(others)) = (self.next_from(time, end), other.next_from(time, end)) {
            *compared += runs().count() as u64;
            if own != others || *compared > MAX_COMPARED {
                return false;
            }
            time = own + 1;
        }
        self.next_from(time, end).is_none() && other.next_from(time, end).is_none()
    }

    /// Returns the first time in `[from, to)`.
    fn next_from(&self, from: u64, to: u64) -> Option<u64> {
        self.active.iter().filter_map(|run| run.next_from(from)).min().filter(|&time| time < to)
    }
}

/// Returns the least common multiple, or `None` if it does not fit.
fn least_common_multiple(a: u64, b: u64) -> Option<u64> {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    (a / x).checked_mul(b)
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
    fn runs_that_encode_the_same_times_are_equal() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        let mut equal = 0;
        for _ in 0..20_000 {
            let mut runs = || -> Vec<RegularRun> {
                (0..random.random_range(1..4))
                    .map(|_| {
                        let first = random.random_range(1..6);
                        let stride = random.random_range(1..5);
                        RegularRun { first, stride, last: first + stride * random.random_range(0..5) }
                    })
                    .collect()
            };
            let (a, b) = (History::from_runs(runs()), History::from_runs(runs()));
            let naive = a.times() == b.times();
            assert_eq!(same_times(&a.runs, &b.runs), naive, "{a:?} {b:?}");
            equal += usize::from(naive);
        }
        assert!(equal > 50, "{equal} pairs are equal");
    }

    #[test]
    fn histories_of_any_length_are_compared_without_listing_their_updates() {
        let history = |text: &str| serde_json::from_str::<History>(text).unwrap();
        let whole = history("[[7,7000000000000000000,7]]");
        let parts = history("[[7,6999999999999999993,14],[14,7000000000000000000,14]]");
        assert!(parts.is_prefix_of(&whole) && whole.is_prefix_of(&parts));
        let gap = history(
            "[[7,6999999999999999993,14],[14,6999999999999999986,14],[7000000000000000000,7000000000000000000,1]]",
        );
        assert!(gap.is_prefix_of(&whole));
        let shorter = history("[[7,70,7]]");
        assert!(shorter.is_prefix_of(&whole) && !whole.is_prefix_of(&shorter));
        assert!(!history("[[7,70,7],[71,71,1]]").is_prefix_of(&whole));
    }

    #[test]
    fn times_that_do_not_increase_are_an_error() {
        let mut history = coded(&[10, 20]);
        assert!(history.push(20).unwrap_err().to_string().contains("cannot follow one at 20"));
        assert!(coded(&[]).push(0).is_err());
    }

    #[test]
    fn invalid_stored_runs_are_an_error() {
        for text in ["[[0,10,1]]", "[[10,5,1]]", "[[1,10,0]]", "[[1,10,4]]", "[[1,18446744073709551616,1]]"] {
            assert!(serde_json::from_str::<History>(text).is_err(), "{text}");
        }
    }
}
