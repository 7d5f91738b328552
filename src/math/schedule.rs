//! When a run updates its averages and when it stores them.

use super::history::{History, MAX_UPDATES};
use crate::error::{Error, Result};

/// When averages are updated and stored: every so many steps, from a step on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Schedule {
    /// Steps between updates.
    pub update_every: u64,
    /// No update before this step.
    pub update_after_step: u64,
    /// Steps between snapshots; an update happens at each.
    pub checkpoint_every: u64,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule { update_every: 10, update_after_step: 0, checkpoint_every: 1000 }
    }
}

impl Schedule {
    /// Checks the intervals.
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

    /// Whether a snapshot is due at `time`, when the call before was at `previous`.
    ///
    /// On a clock that jumps (images, tokens) an interval is due at the first call in or after each multiple of it.
    pub fn is_snapshot_due(&self, previous: u64, time: u64) -> bool {
        time >= self.update_after_step && crosses(self.checkpoint_every, previous, time)
    }

    /// Whether an update is due at `time`, when the call before was at `previous`: also at each snapshot.
    pub fn is_update_due(&self, previous: u64, time: u64) -> bool {
        time >= self.update_after_step
            && (crosses(self.update_every, previous, time) || crosses(self.checkpoint_every, previous, time))
    }

    /// The snapshots of a training of `steps` steps.
    pub fn snapshots(&self, steps: u64) -> Vec<u64> {
        let every = self.checkpoint_every;
        let count = steps.checked_div(every).unwrap_or(0);
        (1..=count).map(|i| i * every).filter(|&t| t >= self.update_after_step).collect()
    }

    /// The updates of a training of `steps` steps.
    ///
    /// # Errors
    /// [`Error::Setting`] for an interval of 0, or where that makes too many updates to list.
    pub fn updates(&self, steps: u64) -> Result<History> {
        self.check()?;
        if steps / self.update_every.min(self.checkpoint_every) > MAX_UPDATES {
            let reason = format!("{steps} steps make more than {MAX_UPDATES} updates: plan with a longer interval");
            return Err(Error::Setting { option: "update_every", reason });
        }
        let mut times = self.snapshots(steps);
        let every = self.update_every;
        times.extend((1..=steps / every).map(|i| i * every).filter(|&t| t >= self.update_after_step));
        times.sort_unstable();
        times.dedup();
        History::from_times(times)
    }
}

fn crosses(every: u64, previous: u64, time: u64) -> bool {
    every > 0 && time / every > previous / every
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_calls_for_what_the_schedule_lists() {
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
    fn a_clock_that_jumps_is_due_once_per_multiple() {
        let schedule = Schedule { update_every: 1000, ..Schedule::default() };
        assert!(schedule.is_update_due(900, 1100));
        assert!(!schedule.is_update_due(1100, 1900));
        assert!(schedule.is_update_due(1900, 5000));
    }

    #[test]
    fn intervals_of_zero_are_refused() {
        assert!(Schedule { update_every: 0, ..Schedule::default() }.check().is_err());
        assert!(Schedule { checkpoint_every: 0, ..Schedule::default() }.check().is_err());
    }
}
