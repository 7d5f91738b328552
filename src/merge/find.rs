//! Where the checkpoints are: files, indices of shards, folders, and folders of any of these.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::index::{INDEX, Index};
use super::natural;
use crate::error::{Error, Result};

/// What the weights of a folder are called, by the tools that load them; the first that is there is meant.
const STEMS: [&str; 5] = ["model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights", "pytorch_model"];

/// How files of weights end.
const SAFETENSORS: &str = "safetensors";
const PYTORCH: [&str; 4] = ["bin", "pt", "pth", "ckpt"];

/// How files of PyTorch begin that hold the rest of a training.
const NO_WEIGHTS: [&str; 6] = ["optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args"];

/// A checkpoint, found and not yet opened.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Input {
    /// What stands for it in messages: the file, or the folder.
    pub path: PathBuf,
    /// The folder with all that belongs to it; none for a plain file.
    pub folder: Option<PathBuf>,
    /// The files of weights, in order of their names.
    pub parts: Vec<PathBuf>,
    /// The index of its shards.
    pub index: Option<Index>,
}

impl Input {
    /// Where a file of that name belongs to this checkpoint: in its folder, or beside a file whose name any checkpoint has.
    pub(super) fn beside(&self, name: &str) -> Option<PathBuf> {
        let usual = || is_usual(&self.path).then(|| self.path.parent()).flatten();
        Some(self.folder.as_deref().or_else(usual)?.join(name))
    }
}

/// Whether a file of weights is one of PyTorch's, and no safetensors file.
pub(super) fn is_pytorch(path: &Path) -> bool {
    path.extension().is_some_and(|extension| PYTORCH.iter().any(|own| extension == *own))
}

/// Whether a file's name is one that any checkpoint has: the folder's tells which.
pub(super) fn is_usual(path: &Path) -> bool {
    let name = name(path);
    STEMS.iter().any(|stem| name.strip_prefix(stem).is_some_and(|rest| rest.starts_with(['.', '-'])))
}

/// Finds the checkpoints that some paths name: each is a file, an index of shards or a folder; a single folder that is no
/// checkpoint itself is a folder of checkpoints, which then come in order of their names, by the numbers in them.
///
/// # Errors
/// [`Error::NoSource`], [`Error::Io`], [`Error::Damaged`] and [`Error::Unexpected`], each naming the path.
pub(super) fn find<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<Input>> {
    let found = match paths {
        [] => {
            return Err(Error::NoSource {
                wanted: "checkpoint to average".into(),
                remedy: "name files, or a folder of them",
            });
        }
        [dir] if dir.as_ref().is_dir() => match in_folder(dir.as_ref()) {
            Ok(Some(input)) => return Err(alone(&input)),
            _ => in_folder_of_checkpoints(dir.as_ref())?,
        },
        paths => paths.iter().map(|path| find_one(path.as_ref())).collect::<Result<_>>()?,
    };
    match found.as_slice() {
        [only] => Err(alone(only)),
        _ => Ok(found),
    }
}

/// The error for a single checkpoint. Trainers put the last model beside the folders of earlier ones.
fn alone(input: &Input) -> Error {
    let inner = input.folder.as_ref().map(|dir| in_folder_of_checkpoints(dir)).and_then(Result::ok).unwrap_or_default();
    let why = match inner.iter().find(|inner| inner.folder.is_some() && inner.folder != input.folder) {
        Some(inner) => format!(
            "this is one checkpoint, with others in folders of it, such as `{}`: name those, one by one",
            name(&inner.path)
        ),
        None => "this is one checkpoint, with nothing to average it with: name at least two".into(),
    };
    Error::unexpected(&input.path, why)
}

fn find_one(path: &Path) -> Result<Input> {
    if path.is_dir() {
        let none = || Error::unexpected(path, "no weights are in this folder: name one that holds a checkpoint");
        return in_folder(path)?.ok_or_else(none);
    }
    fs::metadata(path).map_err(Error::io("read", path))?;
    if name(path).ends_with(INDEX) {
        return sharded(path, path.parent().map(Path::to_owned), path);
    }
    if !is_weights(path) {
        let why = "no file of weights: .safetensors, its .index.json, .bin, .pt, .pth and .ckpt are read";
        return Err(Error::unexpected(path, why));
    }
    Ok(single(path, None))
}

fn single(path: &Path, folder: Option<&Path>) -> Input {
    let folder = folder.map(Path::to_owned);
    Input { path: folder.clone().unwrap_or_else(|| path.to_owned()), folder, parts: vec![path.to_owned()], index: None }
}

fn sharded(path: &Path, folder: Option<PathBuf>, index: &Path) -> Result<Input> {
    let index = Index::read(index)?;
    Ok(Input { path: path.to_owned(), folder, parts: index.files(), index: Some(index) })
}

/// The checkpoint that a folder is; none where no weights are in it.
fn in_folder(dir: &Path) -> Result<Option<Input>> {
    for stem in STEMS {
        for ending in [SAFETENSORS, PYTORCH[0]] {
            let file = dir.join(format!("{stem}.{ending}"));
            if file.is_file() {
                return Ok(Some(single(&file, Some(dir))));
            }
            let index = dir.join(format!("{stem}.{ending}{INDEX}"));
            if index.is_file() {
                return sharded(dir, Some(dir.to_owned()), &index).map(Some);
            }
        }
    }
    let entries = entries(dir)?;
    let indices: Vec<&PathBuf> = entries.iter().filter(|path| name(path).ends_with(INDEX)).collect();
    let files: Vec<&PathBuf> = entries.iter().filter(|path| is_weights(path)).collect();
    match (indices.as_slice(), files.as_slice()) {
        ([], []) => Ok(None),
        ([], [file]) => Ok(Some(single(file, Some(dir)))),
        ([index], _) => {
            let input = sharded(dir, Some(dir.to_owned()), index)?;
            match files.iter().find(|file| !input.parts.contains(file)) {
                Some(file) => Err(several(dir, index, file)),
                None => Ok(Some(input)),
            }
        }
        ([], [first, second, ..]) | ([first, second, ..], _) => Err(several(dir, first, second)),
    }
}

fn several(dir: &Path, first: &Path, second: &Path) -> Error {
    let (first, second) = (name(first), name(second));
    let why = format!("both `{first}` and `{second}` are in this folder: name the file of each checkpoint instead");
    Error::unexpected(dir, why)
}

/// All checkpoints in a folder: files, shards with their indices, and folders.
fn in_folder_of_checkpoints(dir: &Path) -> Result<Vec<Input>> {
    let entries = entries(dir)?;
    let (mut found, mut shards) = (Vec::new(), BTreeSet::new());
    for index in entries.iter().filter(|path| name(path).ends_with(INDEX)) {
        let input = sharded(index, Some(dir.to_owned()), index)?;
        shards.extend(input.parts.iter().cloned());
        found.push(input);
    }
    for path in &entries {
        if path.is_dir() {
            found.extend(in_folder(path)?);
        } else if is_weights(path) && !shards.contains(path) {
            found.push(single(path, None));
        }
    }
    if found.is_empty() {
        return Err(Error::unexpected(dir, "no weights are in it, nor in its folders: name a folder of checkpoints"));
    }
    found.sort_by(|a, b| natural::compare(&name(&a.path), &name(&b.path)).then_with(|| a.path.cmp(&b.path)));
    Ok(found)
}

/// What is in a folder, but for hidden entries and links to others of its entries, in order.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        let sibling = || path.canonicalize().is_ok_and(|to| to.parent() == dir.canonicalize().ok().as_deref());
        let linked = path.is_symlink() && sibling();
        if !linked && !name(&path).starts_with('.') {
            entries.push(path);
        }
    }
    entries.sort();
    Ok(entries)
}

/// Whether a file is one of weights.
pub(super) fn is_weights(path: &Path) -> bool {
    let ending = is_pytorch(path) || path.extension().is_some_and(|extension| extension == SAFETENSORS);
    ending && path.is_file() && !NO_WEIGHTS.iter().any(|start| name(path).starts_with(start))
}

/// A name without the ending of a file of weights, or of an index.
pub(super) fn without_ending(name: &str) -> &str {
    let name = name.strip_suffix(INDEX).unwrap_or(name);
    match name.rsplit_once('.') {
        Some((stem, ending)) if ending == SAFETENSORS || PYTORCH.contains(&ending) => stem,
        _ => name,
    }
}

/// The last part of a path; names that are not UTF-8 are shown as well as they can be.
pub(super) fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
