//! Checkpoints that become snapshots.

use super::clock::{Clock, equals_count};
use super::layout::ParsedCheckpoint;
use super::listing::CheckpointFile;
use super::{Import, Tool};
use crate::error::{Error, Result};
use crate::math::History;
use crate::pytorch::Number;
use crate::snapshot::SnapshotId;

/// Checkpoint that becomes a snapshot.
pub(super) struct PlannedSnapshot {
    pub file: CheckpointFile,
    /// Name in the run, with the step of the last update contained.
    pub id: SnapshotId,
    pub updates: History,
}

impl PlannedSnapshot {
    /// Derives the snapshot's step and updates from the checkpoint's name.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the tool's count contradicts the name, or if no update was made yet.
    pub(super) fn new(import: &Import, file: &CheckpointFile, parsed: &ParsedCheckpoint) -> Result<PlannedSnapshot> {
        let clock = import.clock(parsed.layout);
        check_count(import, clock, file, parsed)?;
        let Some(step) = clock.last_update(file.call) else {
            let first = clock.first;
            let why = format!("step {} is before the first update, at {first}: check update_after_step", file.call);
            return Err(Error::unexpected(&file.path, why));
        };
        let updates = clock.updates(step).map_err(|error| Error::unexpected(&file.path, error.to_string()))?;
        Ok(PlannedSnapshot { file: file.clone(), id: SnapshotId { index: file.index, step }, updates })
    }

    /// Returns true if an update precedes that of the snapshot's own step.
    ///
    /// After the first update, the averages of all profiles are equal.
    pub(super) fn follows_other_updates(&self) -> bool {
        !self.updates.until(self.id.step.saturating_sub(1)).is_empty()
    }
}

/// Checks that the tool's own count fits the step in the file's name.
fn check_count(import: &Import, clock: Clock, file: &CheckpointFile, parsed: &ParsedCheckpoint) -> Result<()> {
    let call = file.call;
    let expected = clock.counted(call);
    if equals_count(parsed.counted, expected) {
        return Ok(());
    }
    let (value, about) = match parsed.counted {
        Number::Whole(value) => (value as f64, ""),
        Number::Rounded(value, _) => (value, "about "),
    };
    let difference = format!("its `step` is {value}, and at step {call} it would be {expected}");
    let why = if let Some(tool) = parsed.likelier_tool {
        format!("{difference}; it is laid out as those of {tool}: import it as such")
    } else if import.from == Tool::PytorchPosthocEma && value >= 1.0 && value <= call as f64 {
        let after = clock.update_after_step();
        let fitting = Clock { first: call.saturating_add(1) - value as u64, ..clock }.update_after_step();
        format!("{difference} with update_after_step {after}: {about}{fitting} would fit")
    } else {
        format!("{difference}: give the file its own name back, or move it out of the directory")
    };
    Err(Error::unexpected(&file.path, why))
}
