//! The steps at which the averages of a training loop were updated.

use crate::error::{Error, Result};
use crate::math::{EmaChain, EmaDecay, History};

/// Copy of the weights that an average begins with, and the interval of its updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UpdateClock {
    /// Step of the copy; 0 for the initial weights.
    pub start: u64,
    /// Steps from update to update.
    pub every: u64,
}

impl UpdateClock {
    pub(super) fn chain(self, decay: EmaDecay) -> EmaChain {
        EmaChain { decay, start: self.start, every: self.every }
    }

    /// Returns the last update at or before a step; `None` before the first.
    pub(super) fn last_update(self, step: u64) -> Option<u64> {
        let since = step.checked_sub(self.start)?;
        let last = self.start + since / self.every * self.every;
        (last > 0).then_some(last)
    }

    /// Returns the number of updates up to a step, including the copy if it is not of the initial weights.
    pub(super) fn counted(self, step: u64) -> u64 {
        step.checked_sub(self.start).map_or(0, |since| since / self.every + u64::from(self.start > 0))
    }

    /// Returns the updates up to the one at `last`, and other `steps` at which there are sources.
    ///
    /// The initial weights count as those of step 1. If there is an update at step 1, they are one with it.
    pub(super) fn history(self, last: u64, with_initial: bool, steps: &[u64]) -> Result<History> {
        let mut runs = Vec::new();
        let first = if self.start == 0 { self.every } else { self.start };
        if self.start == 0 && with_initial && self.every > 1 {
            runs.push([1, 1, 1]);
        }
        runs.push([first, last, self.every]);
        let own = History::try_from(runs.clone())?;
        let others = steps.iter().filter(|step| !own.contains(**step));
        runs.extend(others.map(|&step| [step, step, 1]));
        History::try_from(runs)
    }

    /// Returns the error for a checkpoint before the first update.
    pub(super) fn too_early(self, path: &std::path::Path, step: u64) -> Error {
        let first = if self.start == 0 { self.every } else { self.start };
        let why = format!(
            "step {step} is before the first update of the average, at {first}: move it out of the folder, or check \
             --update-after-step (`update_after_step`)"
        );
        Error::unexpected(path, why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_follow_the_copy() {
        for (start, every, step, last, counted) in [
            (0, 1, 5, Some(5), 5),
            (0, 10, 9, None, 0),
            (0, 10, 25, Some(20), 2),
            (1, 10, 1, Some(1), 1),
            (1, 10, 25, Some(21), 3),
            (101, 1, 100, None, 0),
            (101, 1, 101, Some(101), 1),
        ] {
            let clock = UpdateClock { start, every };
            assert_eq!((clock.last_update(step), clock.counted(step)), (last, counted), "{clock:?} {step}");
        }
    }

    #[test]
    fn history_has_the_initial_weights_and_steps_of_raw_ones() {
        let times = |start, every, initial, steps: &[u64]| {
            UpdateClock { start, every }.history(31, initial, steps).unwrap().times()
        };
        assert_eq!(times(1, 10, true, &[11, 15, 31]), [1, 11, 15, 21, 31]);
        let clock = UpdateClock { start: 0, every: 10 };
        assert_eq!(clock.history(30, true, &[25]).unwrap().times(), [1, 10, 20, 25, 30]);
        assert_eq!(clock.history(30, false, &[]).unwrap().times(), [10, 20, 30]);
        assert_eq!(times(0, 1, true, &[]).len(), 31);
    }
}
