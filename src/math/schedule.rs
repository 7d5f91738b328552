//! The schedule of updates and snapshots.

use super::history::{History, RegularRun};
use crate::error::{Error, Result};

/// Most snapshots of a training.
const MAX_SNAPSHOTS: u64 = 1 << 26;

/// Intervals at which averages are updated and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Schedule {
    /// Steps between updates.
    pub update_every: u64,
    /// First step at which an update may happen.
    pub update_after_step: u64,
    /// Steps between snapshots. Each snapshot is also an update.
    pub checkpoint_every: u64,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule { update_every: 10, update_after_step: 0, checkpoint_every: 1000 }
    }
}

impl Schedule {
    /// Checks that the intervals are at least 1.
    ///
    /// # Errors
    /// [`Error::Setting`] for an interval of 0.
    pub fn check(&self) -> Result<()> {
        for (option, every) in [("update_every", self.update_every), ("checkpoint_every", self.checkpoint_every)] {
            if every == 0 {
                return Err(Error::Setting { option, reason: "an interval is at least 1 step".into() });
            }
        }
        Ok(())
    }

    /// Returns true if a snapshot is due at `time`, after a previous call at `previous`.
    ///
    /// On a clock that advances by more than 1 (images, tokens), a snapshot is due at the first call at or after each
    /// multiple of the interval.
    pub fn is_snapshot_due(&self, previous: u64, time: u64) -> bool {
        time >= self.update_after_step && crosses(self.checkpoint_every, previous, time)
    }

    /// Returns true if an update is due at `time`, after a previous call at `previous`.
    ///
    /// Each snapshot is also an update.
    pub fn is_update_due(&self, previous: u64, time: u64) -> bool {
        time >= self.update_after_step
            && (crosses(self.update_every, previous, time) || crosses(self.checkpoint_every, previous, time))
    }

    /// Returns the times of the snapshots of a training of `steps` steps.
    pub fn snapshots(&self, steps: u64) -> Vec<u64> {
        let every = self.checkpoint_every;
        let count = steps.checked_div(every).unwrap_or(0);
        (1..=count).map(|i| i * every).filter(|&t| t >= self.update_after_step).collect()
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

/// Returns true if a multiple of `every` is in `(previous, time]`.
fn crosses(every: u64, previous: u64, time: u64) -> bool {
    every > 0 && time / every > previous / every
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_steps_equal_the_listed_updates_and_snapshots() {
        for (update_every, update_after_step, checkpoint_every) in
            [(10, 0, 1000), (7, 0, 100), (10, 105, 250), (1, 3, 1)]
        {
            let schedule = Schedule { update_every, update_after_step, checkpoint_every };
            let steps = 3000;
            let due: Vec<u64> = (1..=steps).filter(|&t| schedule.is_update_due(t - 1, t)).collect();
            assert_eq!(due, schedule.updates(steps).unwrap().times());
            let stored: Vec<u64> = (1..=steps).filter(|&t| schedule.is_snapshot_due(t - 1, t)).collect();
            assert_eq!(stored, schedule.snapshots(steps));
            assert!(stored.iter().all(|t| due.contains(t)));
            assert!(due.iter().all(|&t| t >= update_after_step));
        }
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
}
