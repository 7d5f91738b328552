//! Checkpoints that repeat another, such as `last.ckpt`, which is the newest under a name without a step.

use std::path::PathBuf;

use super::find::file_name;
use super::model::CheckpointModel;
use super::weight_file::EPOCH_KEY;
use crate::error::listed;

/// Checkpoints with their steps.
pub(super) struct SteppedModels {
    pub models: Vec<(u64, CheckpointModel)>,
    pub notes: Vec<String>,
}

/// Leaves out checkpoints that are the same as another, and finds the steps of `odd` ones, which have none.
///
/// Of two checkpoints of one step that are the same, the one without a number in its name is left out. A checkpoint
/// without a step is left out if it is the same as another. Otherwise its step is its epoch, if the steps of the others
/// are theirs.
///
/// # Errors
/// The path of a checkpoint that has no step.
pub(super) fn settle(
    numbered: Vec<(u64, CheckpointModel)>,
    odd: Vec<CheckpointModel>,
) -> Result<SteppedModels, PathBuf> {
    let offset = epoch_offset(&numbered);
    let (mut kept, mut notes) = without_copies(numbered);
    for model in odd {
        if let Some((_, same)) = kept.iter().find(|(_, other)| other.is_same(&model)) {
            notes.push(copy_note(&model, same));
            continue;
        }
        let epoch = model.number(EPOCH_KEY);
        let (Some(offset), Some(epoch)) = (offset, epoch) else { return Err(model.found.path) };
        let step = epoch + offset;
        if kept.iter().any(|(other, _)| *other == step) {
            return Err(model.found.path);
        }
        notes.push(format!("{} is taken as step {step}, by its epoch", listed(&[file_name(&model.found.path)])));
        kept.push((step, model));
    }
    Ok(SteppedModels { models: kept, notes })
}

/// Returns the difference of the steps from the epochs in the files, 0 or 1; `None` if they are not epochs.
fn epoch_offset(numbered: &[(u64, CheckpointModel)]) -> Option<u64> {
    let difference = |(step, model): &(u64, CheckpointModel)| step.checked_sub(model.number(EPOCH_KEY)?);
    let offset = difference(numbered.first()?)?;
    (offset <= 1 && numbered.iter().all(|one| difference(one) == Some(offset))).then_some(offset)
}

/// Leaves out all but one of several checkpoints of one step that are the same.
fn without_copies(mut numbered: Vec<(u64, CheckpointModel)>) -> (Vec<(u64, CheckpointModel)>, Vec<String>) {
    let has_number = |model: &CheckpointModel| file_name(&model.found.path).contains(|c: char| c.is_ascii_digit());
    // The order of the others is that of their names, which the caller keeps.
    numbered.sort_by_key(|(_, model)| !has_number(model));
    let mut kept: Vec<(u64, CheckpointModel)> = Vec::with_capacity(numbered.len());
    let mut notes = Vec::new();
    for (step, model) in numbered {
        match kept.iter().find(|(other, same)| *other == step && same.is_same(&model)) {
            Some((_, same)) => notes.push(copy_note(&model, same)),
            None => kept.push((step, model)),
        }
    }
    (kept, notes)
}

fn copy_note(model: &CheckpointModel, same: &CheckpointModel) -> String {
    let [name, other] = [model, same].map(|model| listed(&[file_name(&model.found.path)]));
    format!("left out, the same as {other}: {name}")
}
