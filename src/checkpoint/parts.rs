//! Folders whose files hold parts of tensors, as the processes of a training wrote them.

use std::path::{Path, PathBuf};

use super::names::file_name;
use crate::error::{Error, Result};
use crate::fs::read_document;

/// File that lists the contents of a folder of `torch.distributed.checkpoint`.
const CONTENTS: &str = ".metadata";

/// Beginning of the names of shards that each hold parts of tensors.
const SHARD: &str = "shard-";

/// Ending of the names of files with a module's state that DeepSpeed writes.
const MODEL_STATES: &str = "model_states.pt";

/// File that names the newest of DeepSpeed's checkpoints in a folder.
const LATEST: &str = "latest";

/// Beginning of the names of folders in which accelerate stores a model of FSDP.
const FSDP_MODEL: &str = "pytorch_model_fsdp";

/// Library that wrote a folder with parts of tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PartsFolder {
    /// `torch.distributed.checkpoint`: a list of contents, and files of rectangles.
    Distributed,
    /// `HuggingFaceStorageWriter`: safetensors files of rectangles.
    Shards,
    /// DeepSpeed: the states of the module and of the optimizer.
    DeepSpeed,
}

impl PartsFolder {
    /// Recognises a folder by the names of its files.
    pub(super) fn of(dir: &Path) -> Option<PartsFolder> {
        if dir.join(CONTENTS).is_file() {
            return Some(PartsFolder::Distributed);
        }
        let names: Vec<String> = std::fs::read_dir(dir).ok()?.flatten().map(|entry| file_name(&entry.path())).collect();
        if names.iter().any(|name| name.ends_with(MODEL_STATES)) {
            return Some(PartsFolder::DeepSpeed);
        }
        names.iter().any(|name| is_shard(name)).then_some(PartsFolder::Shards)
    }
}

/// Returns true for the name of a file with parts of tensors.
pub(super) fn is_shard(name: &str) -> bool {
    name.starts_with(SHARD) && name.ends_with(".safetensors")
}

/// Returns the folder of the model in one of accelerate, whose other folders hold the optimizer's state. Returns the
/// other models, too.
pub(super) fn model_folders(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_model = |path: &PathBuf| file_name(path).starts_with(FSDP_MODEL) && PartsFolder::of(path).is_some();
    let mut folders: Vec<PathBuf> = entries.filter(is_model).collect();
    folders.sort();
    folders
}

/// Returns the newest of DeepSpeed's checkpoints in a folder, as the file `latest` names it.
///
/// # Errors
/// [`Error::Io`], and [`Error::Damaged`] if the file names something else.
pub(super) fn latest(dir: &Path) -> Result<Option<PathBuf>> {
    let path = dir.join(LATEST);
    if !path.is_file() {
        return Ok(None);
    }
    let text = read_document(&path)?;
    let tag = String::from_utf8_lossy(&text).trim().to_owned();
    let folder = dir.join(&tag);
    if tag.is_empty() || PartsFolder::of(&folder) != Some(PartsFolder::DeepSpeed) {
        let why = format!("it names `{tag}`, where no checkpoint of DeepSpeed is: name the folder of a checkpoint");
        return Err(Error::damaged(&path, why));
    }
    Ok(Some(folder))
}
