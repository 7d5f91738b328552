//! Notes on how checkpoints were read, each said once for all of them.

use std::collections::BTreeSet;

use super::model::{CheckpointModel, TensorEntry};
#[cfg(feature = "pytorch")]
use super::weight_file::WeightFile;
use crate::error::{listed, shown};

/// Returns the notes on some checkpoints.
pub(super) fn of_models(models: &[CheckpointModel]) -> Vec<String> {
    let mut notes = BTreeSet::new();
    #[cfg(feature = "pytorch")]
    notes.extend(models.iter().flat_map(|model| &model.files).filter_map(choice));
    #[cfg(feature = "pytorch")]
    notes.extend(nones(models));
    notes.extend(models.iter().find_map(wrong_size));
    let left_out: BTreeSet<&str> = models.iter().flat_map(|model| &model.left_out).map(String::as_str).collect();
    if !left_out.is_empty() {
        let names: Vec<&str> = left_out.into_iter().collect();
        notes.insert(format!("left out: {}", listed(&names)));
    }
    notes.into_iter().collect()
}

/// Names an index of shards whose total size is not that of their tensors. Libraries load such models, too.
fn wrong_size(model: &CheckpointModel) -> Option<String> {
    let (path, index) = model.found.index.as_ref()?;
    let total = index.total_size().filter(|_| model.left_out.is_empty())?;
    let own = model.tensors.values().filter(|entry| entry.file < model.found.own_files);
    let found: u64 = own.map(TensorEntry::bytes).sum();
    (found != total).then(|| {
        format!(
            "{} has a `total_size` of {total} bytes, but its shards hold {found}: check that they are of one save",
            shown(path)
        )
    })
}

/// Names the entry of a training checkpoint that was taken for the model.
#[cfg(feature = "pytorch")]
fn choice(file: &WeightFile) -> Option<String> {
    let WeightFile::Torch(weights) = file else { return None };
    let Some(key) = weights.key.as_ref().filter(|_| !weights.other_models.is_empty()) else {
        return weights.note.map(str::to_owned);
    };
    Some(format!(
        "the entry `{key}` of each checkpoint is averaged; {} hold weights too, and --key (`key`) chooses them",
        listed(&weights.other_models)
    ))
}

/// Names the entries of models that are None, which no average holds.
#[cfg(feature = "pytorch")]
fn nones(models: &[CheckpointModel]) -> Option<String> {
    let files = models.iter().flat_map(|model| &model.files);
    let names: BTreeSet<&str> = files
        .filter_map(|file| match file {
            WeightFile::Torch(weights) => Some(&weights.nones),
            WeightFile::Safetensors(_) => None,
        })
        .flatten()
        .map(String::as_str)
        .collect();
    let names: Vec<&str> = names.into_iter().collect();
    (!names.is_empty()).then(|| format!("None in the checkpoints, and so not in the average: {}", listed(&names)))
}
