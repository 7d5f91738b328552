//! Updates of a history, in groups of consecutive updates if there are many.
//!
//! A history of a billion updates is a few runs, but sums over its updates would take minutes and gigabytes. An average
//! tracked on the last update of each group only is the same chain on fewer updates, with the profile's exact mass on
//! each group. Sums over groups therefore differ from sums over updates only by the change of the densities within a
//! group, so groups are short where densities change fast: the updates next before a snapshot are single, and further
//! back the length of a group is a fixed small share of the distance to the snapshot. The squared norm of a density
//! that decays over that distance is then off by a twelfth of the share's square.

use super::history::{History, RegularRun};
use crate::error::{Error, Result};

/// Largest length of a group, as a share of its time.
///
/// The density of a power function of exponent `gamma` changes by `gamma` times this within a group.
const MAX_SHARE_OF_TIME: f64 = 0.01;

/// Most pairs of a group and a run that are looked at. Runs of a tracker hardly overlap.
const MAX_VISITS: usize = 1 << 28;

/// Consecutive updates, seen as one: the last time and the number of updates of each group.
pub(in crate::math) struct Groups {
    /// Time of the last update of each group.
    pub times: Vec<u64>,
    /// Number of updates of each group. One that two overlapping runs share counts twice.
    pub counts: Vec<f64>,
    /// True if updates are grouped and some of their runs overlap.
    pub overlap: bool,
}

impl Groups {
    /// Groups the updates at or before `at`. Each of `marks`, which are updates, and the first update end a group.
    ///
    /// A history of at most `limit` updates has one group per update; a longer one has about `limit` groups.
    ///
    /// # Errors
    /// [`Error::History`] if thousands of runs of a long history overlap.
    pub(in crate::math) fn new(history: &History, at: u64, marks: &[u64], limit: usize) -> Result<Groups> {
        let history = history.until(at);
        let updates = history.runs().iter().fold(0u64, |sum, run| sum.saturating_add(run.count()));
        if updates <= limit as u64 {
            let times = history.times();
            return Ok(Groups { counts: vec![1.0; times.len()], times, overlap: false });
        }
        let mut ends: Vec<u64> = marks.iter().copied().chain(history.first()).chain(history.last()).collect();
        ends.sort_unstable();
        ends.dedup();
        let (times, counts) = HistoryWalk::new(history.runs()).group(&ends, share_of_distance(&ends, limit))?;
        Ok(Groups { times, counts, overlap: overlap(history.runs()) })
    }

    /// Returns true if each group is a single update.
    pub(in crate::math) fn are_single(&self) -> bool {
        self.counts.iter().all(|&count| count == 1.0)
    }
}

/// Returns true if two runs overlap in time.
fn overlap(runs: &[RegularRun]) -> bool {
    let mut runs = runs.to_vec();
    runs.sort_unstable_by_key(|run| run.first);
    runs.windows(2).any(|pair| pair[1].first <= pair[0].last)
}

/// Returns the share of the distance that makes about `limit` groups.
///
/// With a share `s`, `1/s` updates before an end are single, and `ln(length s)/s` groups follow.
fn share_of_distance(ends: &[u64], limit: usize) -> f64 {
    let before = std::iter::once(&0).chain(ends);
    let groups: f64 = ends.iter().zip(before).map(|(end, before)| 1.0 + ((end - before) as f64).ln_1p()).sum();
    groups / limit as f64
}

/// Walk through a history, from its last update to the first.
struct HistoryWalk {
    /// Runs that end earlier, the latest at the end.
    earlier: Vec<RegularRun>,
    /// Runs that the current time is within.
    active: Vec<RegularRun>,
    visits: usize,
}

impl HistoryWalk {
    fn new(runs: &[RegularRun]) -> HistoryWalk {
        let mut earlier = runs.to_vec();
        earlier.sort_unstable_by_key(|run| run.last);
        HistoryWalk { earlier, active: Vec::new(), visits: 0 }
    }

    /// Returns the last time and the number of updates of each group.
    ///
    /// Each of `ends`, which are updates and increase, ends a group.
    fn group(mut self, ends: &[u64], share: f64) -> Result<(Vec<u64>, Vec<f64>)> {
        let mut times = Vec::new();
        let mut counts = Vec::new();
        for i in (0..ends.len()).rev() {
            let before = if i == 0 { 0 } else { ends[i - 1] };
            let mut end = ends[i];
            while end > before {
                let length = f64::min(share * (ends[i] - end) as f64, MAX_SHARE_OF_TIME * end as f64);
                let next = self.last_until((end - 1).saturating_sub(length as u64)).unwrap_or(0).max(before);
                times.push(end);
                counts.push(self.count_between(next, end)? as f64);
                end = next;
            }
        }
        times.reverse();
        counts.reverse();
        Ok((times, counts))
    }

    /// Returns the newest update at or before `time`, which must not grow from call to call.
    fn last_until(&mut self, time: u64) -> Option<u64> {
        while let Some(run) = self.earlier.pop_if(|run| run.last >= time) {
            self.active.push(run);
        }
        let active = self.active.iter().filter_map(|run| run.last_until(time)).max();
        active.max(self.earlier.last().map(|run| run.last))
    }

    /// Returns the number of updates in `(from, to]`, and forgets the runs that begin after `from`.
    fn count_between(&mut self, from: u64, to: u64) -> Result<u64> {
        while let Some(run) = self.earlier.pop_if(|run| run.last > from) {
            self.active.push(run);
        }
        self.visits += self.active.len();
        if self.visits > MAX_VISITS {
            let why = "thousands of its runs overlap: no tracker writes such a history".to_owned();
            return Err(Error::History(why));
        }
        let count = self.active.iter().map(|run| run.count_until(to) - run.count_until(from)).sum();
        self.active.retain(|run| run.first <= from);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::{Chain, EmaChain, EmaDecay, Profile, Ramp};

    fn history(text: &str) -> History {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn groups_end_at_updates_and_hold_each_once() {
        for (text, marks) in [
            ("[[10,1000000,10]]", vec![500_000, 1_000_000]),
            ("[[7,700000,7],[701000,1701000,100]]", vec![7, 14, 1_000_000, 1_701_000]),
            ("[[100,90000,10],[90001,190000,1],[190500,190500,1]]", vec![150_000]),
        ] {
            let history = history(text);
            let times = history.times();
            let groups = Groups::new(&history, u64::MAX, &marks, 2000).unwrap();
            assert!(groups.times.len() <= 2 * 2000 && !groups.overlap, "{text}: {}", groups.times.len());
            assert!(marks.iter().chain(times.first()).chain(times.last()).all(|mark| groups.times.contains(mark)));
            let mut before = 0;
            for (&time, &count) in groups.times.iter().zip(&groups.counts) {
                let naive = times.iter().filter(|&&t| before < t && t <= time).count();
                assert!(history.contains(time) && count == naive as f64, "{text}: {count} of {naive} at {time}");
                before = time;
            }
        }
    }

    #[test]
    fn interleaved_runs_are_grouped_and_reported_to_overlap() {
        let history = history("[[7,700000,7],[100,700000,100]]");
        let groups = Groups::new(&history, 700_000, &[350_000], 3000).unwrap();
        assert!(groups.overlap && groups.times.iter().all(|&time| history.contains(time)));
        let total: f64 = groups.counts.iter().sum();
        assert_eq!(total, 107_000.0);
    }

    #[test]
    fn short_history_is_not_grouped() {
        let history = history("[[10,1000000,10]]");
        let groups = Groups::new(&history, 500_000, &[500_000], 50_000).unwrap();
        assert!(groups.are_single() && groups.times == history.until(500_000).times());
    }

    #[test]
    fn thousands_of_overlapping_runs_are_an_error() {
        let runs: Vec<String> = (1..=5000u64).map(|i| format!("[{i},{},5000]", i + 5_000_000_000_u64)).collect();
        let history = history(&format!("[{}]", runs.join(",")));
        let text = Groups::new(&history, u64::MAX, &[], 1 << 18).err().unwrap().to_string();
        assert!(text.contains("thousands of its runs overlap"), "{text}");
    }

    /// Compares the decay of each group with the product over its updates.
    #[test]
    fn decay_of_a_group_equals_the_product_of_its_updates() {
        let history = history("[[1,3999991,10]]");
        let times = history.times();
        let groups = Groups::new(&history, u64::MAX, &[2_000_001, 3_999_991], 4000).unwrap();
        assert!(groups.times.len() < 10_000);
        let ramped = EmaDecay { beta: 0.9999, floor: 0.0, ramp: Ramp::Ratio { offset: 10.0 } };
        for chain in [
            Chain::Counter { gamma: 6.94, stride: 10, offset: 2 },
            Chain::CorrectedCounter { gamma: 6.94, stride: 10, offset: 2 },
            Chain::Tracked(Profile::gamma(6.94).unwrap()),
            Chain::Tracked(Profile::beta(0.99999).unwrap()),
            Chain::Ema(EmaChain { decay: ramped, start: 1, every: 10 }),
        ] {
            let decays = chain.decays(&times).beta;
            let grouped = chain.group_decays(&groups).unwrap();
            let mut next = 0;
            for (i, &time) in groups.times.iter().enumerate() {
                let from = next;
                next = times.partition_point(|&t| t <= time);
                let exact: f64 = decays[from..next].iter().product();
                let error = (grouped.beta[i] - exact).abs();
                assert!(error <= 1e-9 * exact.max(1e-9), "{chain:?} at {time}: {} is not {exact}", grouped.beta[i]);
                assert!((grouped.one_minus_beta[i] + grouped.beta[i] - 1.0).abs() < 1e-15);
            }
        }
    }
}
