//! Search for checkpoints: files, indices of shards, folders, and folders of any of these.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::natural;
use crate::error::{Error, Result};
use crate::fs::parent_dir;
use crate::snapshot::{INDEX_SUFFIX, ShardIndex};

/// Names of the weights in a folder, without extensions, as the tools that load them expect. The first one found
/// counts.
const WEIGHT_NAMES: [&str; 5] =
    ["model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights", "pytorch_model"];

/// Extension of safetensors files.
const SAFETENSORS: &str = "safetensors";

/// Extensions of PyTorch files; `bin` is that of Hugging Face's tools.
const PYTORCH: [&str; 4] = ["bin", "pt", "pth", "ckpt"];

/// Prefixes of the names of PyTorch files that hold other state of a training.
const TRAINING_STATE: [&str; 6] = ["optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args"];

/// Checkpoint that was found, but not yet opened.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FoundCheckpoint {
    /// File or folder that names the checkpoint in messages.
    pub path: PathBuf,
    /// Folder of the checkpoint; `None` for a plain file.
    pub folder: Option<PathBuf>,
    /// Files of weights, in order of their names.
    pub files: Vec<PathBuf>,
    /// Index of the shards, with its path.
    pub index: Option<(PathBuf, ShardIndex)>,
}

impl FoundCheckpoint {
    /// Returns the path of a file that belongs to this checkpoint: in its folder, or beside a file with a usual name.
    pub(super) fn beside(&self, name: &str) -> Option<PathBuf> {
        let dir = match &self.folder {
            Some(folder) => folder,
            None if has_usual_name(&self.path) => self.path.parent()?,
            None => return None,
        };
        Some(dir.join(name))
    }

    fn single_file(path: &Path) -> FoundCheckpoint {
        FoundCheckpoint { path: path.to_owned(), folder: None, files: vec![path.to_owned()], index: None }
    }

    fn file_in_folder(path: &Path, folder: &Path) -> FoundCheckpoint {
        FoundCheckpoint {
            path: folder.to_owned(),
            folder: Some(folder.to_owned()),
            files: vec![path.to_owned()],
            index: None,
        }
    }

    fn sharded(path: &Path, folder: Option<&Path>, index_path: &Path) -> Result<FoundCheckpoint> {
        let index = ShardIndex::read(index_path)?;
        Ok(FoundCheckpoint {
            path: path.to_owned(),
            folder: folder.map(Path::to_owned),
            files: index.shards().into_iter().map(|name| index_path.with_file_name(name)).collect(),
            index: Some((index_path.to_owned(), index)),
        })
    }
}

/// Finds the checkpoints at some paths: each is a file, an index of shards or a folder.
///
/// A single folder that is not a checkpoint itself is a folder of checkpoints. They are sorted by their names, by the
/// numbers in them.
///
/// # Errors
/// [`Error::NoSource`], [`Error::Io`], [`Error::Damaged`] and [`Error::Unexpected`], each with the path.
pub(super) fn find<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<FoundCheckpoint>> {
    let found = match paths {
        [] => {
            return Err(Error::NoSource {
                wanted: "checkpoint to average".into(),
                remedy: "name files, or a folder of them",
            });
        }
        [dir] if dir.as_ref().is_dir() => match find_in_folder(dir.as_ref()) {
            Ok(Some(only)) => return Err(single_checkpoint(&only)),
            _ => find_all_in_folder(dir.as_ref())?,
        },
        paths => paths.iter().map(|path| find_one(path.as_ref())).collect::<Result<_>>()?,
    };
    match found.as_slice() {
        [only] => Err(single_checkpoint(only)),
        _ => Ok(found),
    }
}

/// Returns the error for a single checkpoint. Trainers put the last model beside the folders of earlier ones.
fn single_checkpoint(only: &FoundCheckpoint) -> Error {
    let inner = only.folder.as_ref().and_then(|dir| find_all_in_folder(dir).ok()).unwrap_or_default();
    let why = match inner.iter().find(|inner| inner.folder.is_some() && inner.folder != only.folder) {
        Some(inner) => format!(
            "this is one checkpoint, and its folders hold others, such as `{}`: name those, one by one",
            file_name(&inner.path)
        ),
        None => "this is one checkpoint, with nothing to average it with: name at least two".into(),
    };
    Error::unexpected(&only.path, why)
}

fn find_one(path: &Path) -> Result<FoundCheckpoint> {
    if path.is_dir() {
        return find_in_folder(path)?
            .ok_or_else(|| Error::unexpected(path, "no weights are in this folder: name one that holds a checkpoint"));
    }
    fs::metadata(path).map_err(Error::io("read", path))?;
    if is_index(path) {
        return FoundCheckpoint::sharded(path, Some(parent_dir(path)), path);
    }
    if !is_weights(path) {
        let why =
            "not a file of weights: name a .safetensors file, its .index.json, or a .bin, .pt, .pth or .ckpt file";
        return Err(Error::unexpected(path, why));
    }
    Ok(FoundCheckpoint::single_file(path))
}

/// Finds the checkpoint that a folder is; `None` if it holds no weights.
fn find_in_folder(dir: &Path) -> Result<Option<FoundCheckpoint>> {
    for name in WEIGHT_NAMES {
        for extension in [SAFETENSORS, PYTORCH[0]] {
            let file = dir.join(format!("{name}.{extension}"));
            if file.is_file() {
                return Ok(Some(FoundCheckpoint::file_in_folder(&file, dir)));
            }
            let index = dir.join(format!("{name}.{extension}{INDEX_SUFFIX}"));
            if index.is_file() {
                return FoundCheckpoint::sharded(dir, Some(dir), &index).map(Some);
            }
        }
    }
    let entries = entries(dir)?;
    let indices: Vec<&PathBuf> = entries.iter().filter(|path| is_index(path)).collect();
    let files: Vec<&PathBuf> = entries.iter().filter(|path| is_weights(path)).collect();
    match (indices.as_slice(), files.as_slice()) {
        ([], []) => Ok(None),
        ([], [file]) => Ok(Some(FoundCheckpoint::file_in_folder(file, dir))),
        ([index], _) => {
            let found = FoundCheckpoint::sharded(dir, Some(dir), index)?;
            match files.iter().find(|file| !found.files.contains(file)) {
                Some(file) => Err(several_in_folder(dir, index, file)),
                None => Ok(Some(found)),
            }
        }
        ([], [first, second, ..]) | ([first, second, ..], _) => Err(several_in_folder(dir, first, second)),
    }
}

fn several_in_folder(dir: &Path, first: &Path, second: &Path) -> Error {
    let first = file_name(first);
    let second = file_name(second);
    let why = format!("both `{first}` and `{second}` are in this folder: name the file of each checkpoint instead");
    Error::unexpected(dir, why)
}

/// Finds all checkpoints in a folder: files, shards with their indices, and folders.
fn find_all_in_folder(dir: &Path) -> Result<Vec<FoundCheckpoint>> {
    let entries = entries(dir)?;
    let mut found = Vec::new();
    let mut shards = BTreeSet::new();
    for index in entries.iter().filter(|path| is_index(path)) {
        let checkpoint = FoundCheckpoint::sharded(index, Some(dir), index)?;
        shards.extend(checkpoint.files.iter().cloned());
        found.push(checkpoint);
    }
    for path in &entries {
        if path.is_dir() {
            found.extend(find_in_folder(path)?);
        } else if is_weights(path) && !shards.contains(path) {
            found.push(FoundCheckpoint::single_file(path));
        }
    }
    if found.is_empty() {
        return Err(Error::unexpected(dir, "no weights are in it, nor in its folders: name a folder of checkpoints"));
    }
    found.sort_by(|a, b| natural::compare(&file_name(&a.path), &file_name(&b.path)).then_with(|| a.path.cmp(&b.path)));
    Ok(found)
}

/// Lists a folder in order, without hidden entries and without links to other entries.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if !file_name(&path).starts_with('.') && !is_link_to_sibling(&path, dir) {
            entries.push(path);
        }
    }
    entries.sort();
    Ok(entries)
}

fn is_link_to_sibling(path: &Path, dir: &Path) -> bool {
    path.is_symlink() && path.canonicalize().is_ok_and(|to| to.parent() == dir.canonicalize().ok().as_deref())
}

fn is_index(path: &Path) -> bool {
    file_name(path).ends_with(INDEX_SUFFIX)
}

/// Returns true if a file is one of weights, by its name.
pub(super) fn is_weights(path: &Path) -> bool {
    let known = is_pytorch(path) || path.extension().is_some_and(|extension| extension == SAFETENSORS);
    known && path.is_file() && !TRAINING_STATE.iter().any(|prefix| file_name(path).starts_with(prefix))
}

/// Returns true if a file of weights is one of PyTorch's and not a safetensors file.
pub(super) fn is_pytorch(path: &Path) -> bool {
    path.extension().is_some_and(|extension| PYTORCH.iter().any(|known| extension == *known))
}

/// Returns true if a file has the same name in every checkpoint, so that only the folder's name identifies it.
pub(super) fn has_usual_name(path: &Path) -> bool {
    let name = file_name(path);
    WEIGHT_NAMES.iter().any(|usual| name.strip_prefix(usual).is_some_and(|rest| rest.starts_with(['.', '-'])))
}

/// Returns a name without the extension of a file of weights or of an index.
pub(super) fn without_extension(name: &str) -> &str {
    let name = name.strip_suffix(INDEX_SUFFIX).unwrap_or(name);
    match name.rsplit_once('.') {
        Some((stem, extension)) if extension == SAFETENSORS || PYTORCH.contains(&extension) => stem,
        _ => name,
    }
}

/// Returns the last component of a path; bytes that are not UTF-8 are replaced.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
