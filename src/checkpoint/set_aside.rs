//! Files that are left out beside others: those within an epoch, and averages that this library wrote.

use std::path::PathBuf;

use super::model::CheckpointModel;
use super::names::{file_name, is_recovery};
use crate::error::listed;
use crate::snapshot::{PROFILE, STEP};

/// Reason to leave out a file within an epoch, whose time is not that of an epoch.
const WITHIN_EPOCH: &str = "left out, saved within an epoch to recover from a crash";

/// Reason to leave out an average that an earlier call wrote beside the checkpoints.
const OWN_AVERAGE: &str = "left out, an average of such checkpoints itself";

/// Leaves out files within an epoch if there are others. Returns the others, and a note.
#[cfg(feature = "pytorch")]
pub(super) fn without_recovery(paths: Vec<PathBuf>) -> (Vec<PathBuf>, Option<String>) {
    without(paths, WITHIN_EPOCH, |path| path, |path| is_recovery(path))
}

/// Leaves out checkpoints that are not of the series, if there are others. Returns the others, and notes.
pub(super) fn without_odd(models: Vec<CheckpointModel>) -> (Vec<CheckpointModel>, Vec<String>) {
    let (models, recovery) = without(models, WITHIN_EPOCH, path_of, |model| is_recovery(&model.found.path));
    let (models, own) = without(models, OWN_AVERAGE, path_of, is_own_average);
    (models, recovery.into_iter().chain(own).collect())
}

fn path_of(model: &CheckpointModel) -> &PathBuf {
    &model.found.path
}

/// Returns true for an average that this library wrote.
fn is_own_average(model: &CheckpointModel) -> bool {
    let metadata = model.metadata();
    metadata.get(PROFILE).is_some_and(|profile| profile.starts_with('{')) && metadata.contains_key(STEP)
}

fn without<T>(
    all: Vec<T>,
    why: &str,
    path: impl Fn(&T) -> &PathBuf,
    is_odd: impl Fn(&T) -> bool,
) -> (Vec<T>, Option<String>) {
    let (odd, others): (Vec<T>, Vec<T>) = all.into_iter().partition(is_odd);
    if odd.is_empty() || others.is_empty() {
        return (if others.is_empty() { odd } else { others }, None);
    }
    let names: Vec<String> = odd.iter().map(|one| file_name(path(one))).collect();
    (others, Some(format!("{why}: {}", listed(&names))))
}
