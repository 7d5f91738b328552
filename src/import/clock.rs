//! The tools' clocks: the steps of their updates, and the counts that they store.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::error::Result;
use crate::math::History;
use crate::pytorch::Number;

/// Offset of the counter `update_every k + 2` in the decay of update `k`.
///
/// The step counted from 0, plus one as soon as the update has begun, plus one in the formula.
pub(super) const OFFSET: u64 = 2;

/// Times of a tool's updates, on the clock of its file names, which counts the calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clock {
    /// Call of the first update.
    pub first: u64,
    /// Calls from update to update.
    pub every: u64,
}

impl Clock {
    /// Returns the last update at or before a call; `None` before the first.
    pub(super) fn last_update(self, call: u64) -> Option<u64> {
        let since = call.checked_sub(self.first)?;
        Some(self.first + since / self.every * self.every)
    }

    /// Returns the tool's own count at a call: the calls from the first update on, including it.
    pub(super) fn counted(self, call: u64) -> u64 {
        call.saturating_add(1).saturating_sub(self.first)
    }

    /// Returns all updates up to the one at `last`.
    pub(super) fn updates(self, last: u64) -> Result<History> {
        History::try_from(vec![[self.first, last, self.every]])
    }

    /// Returns the `update_after_step` of this clock: 0 if the first update is at step 1.
    pub(super) fn update_after_step(self) -> u64 {
        if self.first == 1 { 0 } else { self.first }
    }
}

/// Returns true if a stored number is this count, rounded as its dtype rounds.
pub(super) fn equals_count(number: Number, count: u64) -> bool {
    match number {
        Number::Whole(value) => u64::try_from(value).is_ok_and(|value| value == count),
        // PyTorch rounds to 16 bits by way of f32.
        Number::Rounded(value, Dtype::F16) => value == f16::from_f32(count as f32).to_f64(),
        Number::Rounded(value, Dtype::BF16) => value == bf16::from_f32(count as f32).to_f64(),
        Number::Rounded(value, Dtype::F32) => value == f64::from(count as f32),
        Number::Rounded(value, _) => value == count as f64,
    }
}

/// Returns true if a stored number could be neither `count + distance` nor `count - distance`.
pub(super) fn distinguishes(number: Number, count: u64, distance: u64) -> bool {
    let others = [count.checked_add(distance), count.checked_sub(distance)];
    others.into_iter().flatten().all(|other| !equals_count(number, other))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the loop of pytorch-posthoc-ema, as its sources have it.
    #[test]
    fn updates_match_the_tool_s_loop() {
        for (after, every) in [(0, 1), (1, 10), (100, 10), (100, 7), (3, 1000)] {
            let clock = Clock { first: u64::max(after, 1), every };
            let mut counted = 0;
            let mut updates = Vec::new();
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
    fn equals_count_rounds_as_the_dtype_does() {
        for (count, value, dtype, equal) in [
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
            assert_eq!(equals_count(Number::Rounded(value, dtype), count), equal, "{count} as {value} of {dtype}");
        }
        assert!(equals_count(Number::Whole(7), 7) && !equals_count(Number::Whole(-7), 7));
    }

    #[test]
    fn distinguishes_counts_that_round_differently() {
        for (count, value, dtype, distinguished) in [
            (20_000, 20_000.0, Dtype::F16, true),
            (70_000, f64::INFINITY, Dtype::F16, false),
            (65_000, 65_000.0, Dtype::F16, true),
            (100_000, 99_840.0, Dtype::BF16, false),
            (100_000, 100_000.0, Dtype::F32, true),
        ] {
            let number = Number::Rounded(value, dtype);
            assert_eq!(distinguishes(number, count, 100), distinguished, "{count} as {value} of {dtype}");
        }
    }
}
