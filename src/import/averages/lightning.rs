//! The count of updates that Lightning's `WeightAveraging` stores.

use std::path::PathBuf;

use super::clock::UpdateClock;
use crate::error::{Error, Result};
use crate::pytorch::Checkpoint;

/// Checks that the averages have as many updates as the options say.
///
/// # Errors
/// [`Error::Unexpected`] for a file whose `n_averaged` does not fit.
pub(super) fn check_counts(paths: &[PathBuf], clock: UpdateClock) -> Result<()> {
    for path in paths {
        let values = Checkpoint::open_values(path)?;
        let number = |keys: &[&str]| values.int(keys).and_then(|number| u64::try_from(number).ok());
        let (Some(step), Some(counted)) = (number(&["global_step"]), number(&["averaging_state", "n_averaged"])) else {
            continue;
        };
        let expected = clock.counted(step);
        if counted != expected {
            let why = format!(
                "its `n_averaged` is {counted}, and at step {step} it would be {expected} with update_every {} from \
                 step {} on: give --update-every (`update_every`) as EMAWeightAveraging's update_every_n_steps, and \
                 --update-after-step (`update_after_step`) as its update_starting_at_step; updates by epochs cannot be \
                 imported",
                clock.every, clock.start
            );
            return Err(Error::unexpected(path, why));
        }
    }
    Ok(())
}
