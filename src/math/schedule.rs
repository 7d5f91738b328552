//! The schedule of updates and snapshots.

use super::history::{History, RegularRun};
use crate::error::{Error, Result};

/// Most snapshots of a training.
const MAX_SNAPSHOTS: u64 = 1 << 26;

/// Default factor between the times of early snapshots.
pub const SNAPSHOT_GROWTH: f64 = 1.2;

/// Smallest factor between the times of early snapshots.
const MIN_GROWTH: f64 = 1.01;

/// Updates up to the first early snapshot, at least.
const UPDATES_BEFORE: u64 = 10;

/// Updates between an early snapshot and any other, at least.
///
/// After a single update, the snapshots of two profiles depend on each other and on those before.
const UPDATES_BETWEEN: u64 = 2;

/// Intervals at which averages are updated and stored.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Schedule {
    /// Steps between updates.
    pub update_every: u64,
    /// First step at which an update may happen.
    pub update_after_step: u64,
    /// Steps between snapshots. Each snapshot is also an update.
    pub checkpoint_every: u64,
    /// Factor between the times of further snapshots, early in the training; `None` for none.
    ///
    /// The first is at the tenth update or at `update_after_step`, whichever is later. They end where the distance to
    /// the next would be `checkpoint_every` or more. Their times are rounded to updates, and depend on nothing but the
    /// schedule. A run of an older version has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_growth: Option<f64>,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule {
            update_every: 10,
            update_after_step: 0,
            checkpoint_every: 1000,
            snapshot_growth: Some(SNAPSHOT_GROWTH),
        }
    }
}

impl Schedule {
    /// Checks that the intervals are at least 1, and the factor between early snapshots at least 1.01.
    ///
    /// # Errors
    /// [`Error::Setting`] for an interval of 0, or a factor that is too small, infinite or NaN.
    pub fn check(&self) -> Result<()> {
        for (option, every) in [("update_every", self.update_every), ("checkpoint_every", self.checkpoint_every)] {
            if every == 0 {
                return Err(Error::Setting { option, reason: "an interval is at least 1 step".into() });
            }
        }
        match self.snapshot_growth {
            Some(growth) if !(growth.is_finite() && growth >= MIN_GROWTH) => {
                let reason = format!("{growth}: a factor of at least {MIN_GROWTH} is needed; 0 switches it off");
                Err(Error::Setting { option: "snapshot_growth", reason })
            }
            _ => Ok(()),
        }
    }

    /// Returns true if a snapshot is due at `time`, after a previous call at `previous`.
    ///
    /// On a clock that advances by more than 1 (images, tokens), a snapshot is due at the first call at or after each
    /// of the times of [`Schedule::snapshots`].
    pub fn is_snapshot_due(&self, previous: u64, time: u64) -> bool {
        time >= self.update_after_step
            && (crosses(self.checkpoint_every, previous, time) || self.is_early_due(previous, time))
    }

    /// Returns true if an update is due at `time`, after a previous call at `previous`.
    ///
    /// Each snapshot is also an update.
    pub fn is_update_due(&self, previous: u64, time: u64) -> bool {
        time >= self.update_after_step
            && (crosses(self.update_every, previous, time) || crosses(self.checkpoint_every, previous, time))
    }

    /// Returns the times of the snapshots of a training of `steps` steps.
    ///
    /// They are the multiples of `checkpoint_every`, and the early ones of `snapshot_growth`.
    pub fn snapshots(&self, steps: u64) -> Vec<u64> {
        let every = self.checkpoint_every;
        let count = steps.checked_div(every).unwrap_or(0);
        let mut times: Vec<u64> = (1..=count).map(|i| i * every).filter(|&t| t >= self.update_after_step).collect();
        if let Some(early) = EarlySnapshots::of(self) {
            times.extend((0..early.count).filter_map(|i| early.time(i)).take_while(|&time| time <= steps));
            times.sort_unstable();
            times.dedup();
        }
        times
    }

    /// Returns true if an early snapshot is due at `time`, after a previous call at `previous`.
    fn is_early_due(&self, previous: u64, time: u64) -> bool {
        // Early snapshots are at multiples of the interval of updates: most calls need no logarithm.
        if !crosses(self.update_every, previous, time) {
            return false;
        }
        EarlySnapshots::of(self).is_some_and(|early| early.is_due(previous, time))
    }

    /// Returns the updates of a training of `steps` steps.
    ///
    /// # Errors
    /// [`Error::Setting`] for an interval of 0, or for more than 67 million snapshots.
    pub fn updates(&self, steps: u64) -> Result<History> {
        self.check()?;
        if steps / self.checkpoint_every > MAX_SNAPSHOTS {
            let reason = format!("{steps} steps make more than {MAX_SNAPSHOTS} snapshots: use a longer interval");
            return Err(Error::Setting { option: "checkpoint_every", reason });
        }
        let mut runs: Vec<RegularRun> = self.multiples(self.update_every, steps).into_iter().collect();
        if !self.checkpoint_every.is_multiple_of(self.update_every) {
            runs.extend(self.multiples(self.checkpoint_every, steps));
        }
        Ok(History::from_runs(runs))
    }

    /// Returns the multiples of `every` from `update_after_step` to `steps`.
    fn multiples(&self, every: u64, steps: u64) -> Option<RegularRun> {
        let first = self.update_after_step.max(1).div_ceil(every).checked_mul(every)?;
        let last = steps / every * every;
        let stride = if first == last { 1 } else { every };
        (first <= last).then_some(RegularRun { first, last, stride })
    }
}

/// Early snapshots of a schedule: their times grow by a factor, and are rounded to updates.
///
/// Evenly spaced snapshots leave an early average few to be blended from: after 1,000 steps, a spacing of 1,000 leaves
/// an error of 45%, and a factor of 1.2 leaves 4%.
struct EarlySnapshots<'a> {
    schedule: &'a Schedule,
    growth: f64,
    first: u64,
    count: u32,
}

impl<'a> EarlySnapshots<'a> {
    /// Returns those of a schedule, if it has any.
    fn of(schedule: &'a Schedule) -> Option<Self> {
        let growth = schedule.snapshot_growth.filter(|growth| *growth >= MIN_GROWTH)?;
        let update_every = schedule.update_every;
        // A shorter time would not grow by the updates that lie between two.
        let updates = (UPDATES_BETWEEN as f64 / (growth - 1.0) - 1e-9).ceil() as u64;
        let after = schedule.update_after_step.max(update_every.checked_mul(updates.max(UPDATES_BEFORE))?);
        let first = after.checked_next_multiple_of(update_every)?;
        // From here on, the next would be as far as a multiple of `checkpoint_every`.
        let end = schedule.checkpoint_every as f64 / (growth - 1.0);
        let count = index(end, first, growth).ceil() as u32;
        (count > 0).then_some(EarlySnapshots { schedule, growth, first, count })
    }

    /// Returns the time of number `i`, a multiple of `update_every`; `None` if a regular snapshot is next to it.
    fn time(&self, i: u32) -> Option<u64> {
        let Schedule { update_every, update_after_step, checkpoint_every, .. } = *self.schedule;
        let exact = self.first as f64 * self.growth.powi(i as i32);
        // A half is rounded up, also on a machine on which its last bits differ.
        let updates = (exact / update_every as f64 * (1.0 + 1e-12) + 0.5) as u64;
        let time = updates.checked_mul(update_every)?;
        let before = time / checkpoint_every * checkpoint_every;
        let is_next = |regular: u64| {
            regular >= update_after_step.max(1) && time.abs_diff(regular) < UPDATES_BETWEEN * update_every
        };
        (!is_next(before) && !is_next(before.saturating_add(checkpoint_every))).then_some(time)
    }

    /// Returns true if a time is in `(previous, time]`.
    fn is_due(&self, previous: u64, time: u64) -> bool {
        // Rounding moves a time by at most half the distance between updates.
        let every = self.schedule.update_every;
        let from = index(previous.saturating_sub(every) as f64, self.first, self.growth) as u32;
        let to = index(time.saturating_add(every) as f64, self.first, self.growth) as u32;
        (from..=to.min(self.count - 1)).filter_map(|i| self.time(i)).any(|due| previous < due && due <= time)
    }
}

/// Returns how often `first` is to be multiplied by `growth` to reach `time`; negative for an earlier one.
fn index(time: f64, first: u64, growth: f64) -> f64 {
    (time / first as f64).ln() / growth.ln()
}

/// Returns true if a multiple of `every` is in `(previous, time]`.
fn crosses(every: u64, previous: u64, time: u64) -> bool {
    every > 0 && time / every > previous / every
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_steps_equal_the_listed_updates_and_snapshots() {
        let schedules = [(10, 0, 1000), (7, 0, 100), (10, 105, 250), (1, 3, 1), (1, 0, 400), (10, 1500, 1000)];
        for (update_every, update_after_step, checkpoint_every) in schedules {
            for snapshot_growth in [None, Some(1.2), Some(1.01), Some(3.0)] {
                let schedule = Schedule { update_every, update_after_step, checkpoint_every, snapshot_growth };
                let steps = 3000;
                let due: Vec<u64> = (1..=steps).filter(|&t| schedule.is_update_due(t - 1, t)).collect();
                assert_eq!(due, schedule.updates(steps).unwrap().times());
                let stored: Vec<u64> = (1..=steps).filter(|&t| schedule.is_snapshot_due(t - 1, t)).collect();
                assert_eq!(stored, schedule.snapshots(steps));
                assert!(stored.iter().all(|t| due.contains(t)));
                assert!(due.iter().all(|&t| t >= update_after_step));
            }
        }
    }

    /// Compares with the rule: each multiple of the interval, and the products of the factor until they are as far.
    #[test]
    fn early_snapshots_grow_by_the_factor_until_the_interval_is_reached() {
        let schedule = Schedule { update_after_step: 100, ..Schedule::default() };
        let mut expected: Vec<u64> = (1..=10).map(|i| 1000 * i).collect();
        let mut exact = 100.0;
        while 0.2 * exact < 1000.0 {
            expected.push((exact / 10.0_f64).round() as u64 * 10);
            exact *= 1.2;
        }
        expected.sort_unstable();
        assert_eq!(schedule.snapshots(10_000), expected);
        assert_eq!(&expected[..14], [100, 120, 140, 170, 210, 250, 300, 360, 430, 520, 620, 740, 890, 1000]);
        assert_eq!(Schedule::default().snapshots(10_000), expected);
        let off = Schedule { snapshot_growth: None, ..schedule };
        assert_eq!(off.snapshots(10_000), (1..=10).map(|i| 1000 * i).collect::<Vec<_>>());
        let late = Schedule { update_after_step: 6000, ..schedule };
        assert_eq!(late.snapshots(10_000), [6000, 7000, 8000, 9000, 10_000]);
        let later = Schedule { update_after_step: 1515, ..schedule };
        assert_eq!(later.snapshots(3000), [1520, 1820, 2000, 2190, 2630, 3000]);
    }

    /// Snapshots after one update each would depend on each other: two profiles add one dimension.
    #[test]
    fn early_snapshots_are_two_updates_from_any_other() {
        for (update_every, checkpoint_every) in [(1, 5), (1, 20), (1, 97), (10, 1000), (10, 105), (7, 100), (100, 1000)]
        {
            for growth in [1.01, 1.1, 1.2, 1.5, 3.0] {
                let schedule =
                    Schedule { update_every, checkpoint_every, snapshot_growth: Some(growth), ..Schedule::default() };
                let snapshots = schedule.snapshots(30_000);
                for pair in snapshots.windows(2) {
                    let is_regular = pair.iter().all(|time| time.is_multiple_of(checkpoint_every));
                    assert!(is_regular || pair[1] - pair[0] >= 2 * update_every, "{pair:?} {schedule:?}");
                }
                assert!(
                    snapshots.iter().filter(|time| **time < 10 * update_every).all(|time| time % checkpoint_every == 0)
                );
            }
        }
    }

    /// A run is cut at each step of a jumping clock: the snapshots do not depend on the calls before.
    #[test]
    fn early_snapshots_are_due_at_the_first_call_at_or_after_their_time() {
        let schedule = Schedule::default();
        let calls: Vec<u64> = (1..=300).map(|i| i * 37 + i % 5).collect();
        let mut previous = 0;
        for time in calls {
            let passed = schedule.snapshots(time).iter().filter(|&&due| due > previous).count();
            assert_eq!(schedule.is_snapshot_due(previous, time), passed > 0, "{previous}..{time}");
            assert!(!schedule.is_snapshot_due(previous, time) || schedule.is_update_due(previous, time));
            previous = time;
        }
        assert!(schedule.is_snapshot_due(0, 120) && !schedule.is_snapshot_due(120, 139));
    }

    #[test]
    fn early_snapshots_of_extreme_intervals_are_few_and_do_not_overflow() {
        let far = Schedule { checkpoint_every: u64::MAX, ..Schedule::default() };
        assert!(far.snapshots(u64::MAX).len() < 250);
        assert!(far.is_snapshot_due(0, u64::MAX));
        let closest = Schedule { snapshot_growth: Some(1.01), ..far };
        assert!(closest.snapshots(u64::MAX).len() < 5000);
        let rare = Schedule { update_every: u64::MAX, ..far };
        assert!(!rare.is_snapshot_due(0, u64::MAX - 1));
        let huge = Schedule { snapshot_growth: Some(f64::MAX), ..Schedule::default() };
        assert_eq!(huge.snapshots(2000), [1000, 2000]);
    }

    #[test]
    fn schedule_without_the_factor_has_no_early_snapshots() {
        let text = r#"{"update_every":10,"update_after_step":0,"checkpoint_every":1000}"#;
        let old: Schedule = serde_json::from_str(text).unwrap();
        assert_eq!(old, Schedule { snapshot_growth: None, ..Schedule::default() });
        assert_eq!(serde_json::to_string(&old).unwrap(), text);
        let new = serde_json::to_string(&Schedule::default()).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&new).unwrap(), Schedule::default());
    }

    #[test]
    fn update_is_due_once_per_multiple_on_a_jumping_clock() {
        let schedule = Schedule { update_every: 1000, ..Schedule::default() };
        assert!(schedule.is_update_due(900, 1100));
        assert!(!schedule.is_update_due(1100, 1900));
        assert!(schedule.is_update_due(1900, 5000));
    }

    #[test]
    fn intervals_of_zero_are_an_error() {
        assert!(Schedule { update_every: 0, ..Schedule::default() }.check().is_err());
        assert!(Schedule { checkpoint_every: 0, ..Schedule::default() }.check().is_err());
    }

    #[test]
    fn factors_that_are_too_small_are_an_error() {
        for growth in [0.0, 1.0, 1.001, -1.2, f64::NAN, f64::INFINITY] {
            let wrong = Schedule { snapshot_growth: Some(growth), ..Schedule::default() };
            let text = wrong.check().unwrap_err().to_string();
            assert!(text.contains("snapshot_growth") && text.contains("0 switches it off"), "{text}");
        }
    }
}
