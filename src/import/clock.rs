//! The tools' clocks: when they updated, and what they counted.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::error::Result;
use crate::math::History;
use crate::pytorch::Number;

/// The counter in the decay of update `k` is `update_every k + 2`: the step counted from 0, plus one as soon as the update
/// is under way, plus one in the formula.
pub(super) const OFFSET: u64 = 2;

/// When updates happened, on the clock of the file names, which counts the calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clock {
    /// The call of the first update.
    pub first: u64,
    /// Calls from update to update.
    pub every: u64,
}

impl Clock {
    /// The last update at or before a call; none before the first.
    pub(super) fn last_update(self, call: u64) -> Option<u64> {
        let since = call.checked_sub(self.first)?;
        Some(self.first + since / self.every * self.every)
    }

    /// What the tool has counted at a call: the calls since, and with, the first update.
    pub(super) fn counted(self, call: u64) -> u64 {
        call.saturating_add(1).saturating_sub(self.first)
    }

    /// All updates up to the one at `last`.
    pub(super) fn updates(self, last: u64) -> Result<History> {
        History::try_from(vec![[self.first, last, self.every]])
    }
}

/// Whether a stored number is a count, rounded as its dtype does.
pub(super) fn stands_for(number: Number, count: u64) -> bool {
    match number {
        Number::Whole(value) => u64::try_from(value).is_ok_and(|value| value == count),
        // PyTorch rounds to 16 bits by way of f32.
        Number::Rounded(value, Dtype::F16) => value == f16::from_f32(count as f32).to_f64(),
        Number::Rounded(value, Dtype::BF16) => value == bf16::from_f32(count as f32).to_f64(),
        Number::Rounded(value, Dtype::F32) => value == f64::from(count as f32),
        Number::Rounded(value, _) => value == count as f64,
    }
}

/// Whether a stored number tells a count from those that are so far apart from it.
pub(super) fn tells(number: Number, count: u64, apart: u64) -> bool {
    let others = [count.checked_add(apart), count.checked_sub(apart)];
    others.into_iter().flatten().all(|other| !stands_for(number, other))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The loop of pytorch-posthoc-ema, as its sources have it.
    #[test]
    fn updates_are_those_of_the_loop() {
        for (after, every) in [(0, 1), (1, 10), (100, 10), (100, 7), (3, 1000)] {
            let clock = Clock { first: u64::max(after, 1), every };
            let (mut counted, mut updates) = (0, Vec::new());
            for call in 1..=500 {
                if call >= after {
                    if counted % every == 0 {
                        updates.push(call);
                    }
                    counted += 1;
                }
                assert_eq!(clock.last_update(call), updates.last().copied(), "{after} {every} {call}");
                assert_eq!(clock.counted(call), counted);
            }
            if let Some(&last) = updates.last() {
                assert_eq!(clock.updates(last).unwrap().times(), updates);
            }
        }
    }

    #[test]
    fn a_rounded_count_is_known_and_another_is_not() {
        for (count, value, dtype, fits) in [
            (2049, 2048.0, Dtype::F16, true),
            (2050, 2048.0, Dtype::F16, false),
            (70_000, f64::INFINITY, Dtype::F16, true),
            (60_000, f64::INFINITY, Dtype::F16, false),
            (1000, 1000.0, Dtype::F16, true),
            (1000, 999.0, Dtype::F16, false),
            (257, 256.0, Dtype::BF16, true),
            (16_777_217, 16_777_216.0, Dtype::F32, true),
            (16_777_217, 16_777_217.0, Dtype::F64, true),
            (5, f64::NAN, Dtype::F16, false),
        ] {
            assert_eq!(stands_for(Number::Rounded(value, dtype), count), fits, "{count} as {value} of {dtype}");
        }
        for (count, value, dtype, told) in [
            (20_000, 20_000.0, Dtype::F16, true),
            (70_000, f64::INFINITY, Dtype::F16, false),
            (65_000, 65_000.0, Dtype::F16, true),
            (100_000, 99_840.0, Dtype::BF16, false),
            (100_000, 100_000.0, Dtype::F32, true),
        ] {
            assert_eq!(tells(Number::Rounded(value, dtype), count, 100), told, "{count} as {value} of {dtype}");
        }
        assert!(stands_for(Number::Whole(7), 7) && !stands_for(Number::Whole(-7), 7));
    }
}
