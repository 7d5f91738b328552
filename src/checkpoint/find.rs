//! Search for checkpoints: files, indices of shards, folders, and folders of any of these.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

pub(crate) use super::names::file_name;
use super::parts::{self, PartsFolder};
use super::{json, natural};
use crate::error::{Error, Result, listed, shown};
use crate::fs::parent_dir;
use crate::snapshot::{INDEX_SUFFIX, ShardIndex};

/// Names of the weights in a folder, without extensions, as the tools that load them expect. The first one found
/// counts.
const WEIGHT_NAMES: [&str; 5] =
    ["model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights", "pytorch_model"];

/// Extension of safetensors files.
const SAFETENSORS: &str = "safetensors";

/// Extensions of PyTorch files; `bin` is that of Hugging Face's tools, and `pth.tar` an old one that timm kept.
const PYTORCH: [&str; 6] = ["bin", "pt", "pth", "ckpt", PICKLE, "pth.tar"];

/// Extension of pickles, which need not be weights.
const PICKLE: &str = "pkl";

/// Prefixes of the names of PyTorch files that hold other state of a training.
const TRAINING_STATE: [&str; 10] = [
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "random_states",
    "training_args",
    "training-state",
    "training_state",
    "sampler",
    "custom_checkpoint",
];

/// Endings of the names, without extensions, of DeepSpeed's files of an optimizer's state.
const OPTIMIZER_STATE: &str = "optim_states";

/// Checkpoint that was found, but not yet opened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FoundCheckpoint {
    /// File or folder that names the checkpoint in messages.
    pub path: PathBuf,
    /// Folder of the checkpoint; `None` for a plain file.
    pub folder: Option<PathBuf>,
    /// Files of the model's weights, in order of their names, then those of other weights beside them.
    pub files: Vec<PathBuf>,
    /// Number of the model's own files.
    pub own_files: usize,
    /// Index of the shards, with its path.
    pub index: Option<(PathBuf, ShardIndex)>,
}

impl FoundCheckpoint {
    /// Returns the path of a file that belongs to this checkpoint: in its folder, or beside a file with a usual name.
    pub(super) fn beside(&self, name: impl AsRef<Path>) -> Option<PathBuf> {
        let dir = match &self.folder {
            Some(folder) => folder,
            None if has_usual_name(&self.path) => self.path.parent()?,
            None => return None,
        };
        Some(dir.join(name))
    }

    fn single_file(path: &Path) -> FoundCheckpoint {
        FoundCheckpoint { path: path.to_owned(), folder: None, files: vec![path.to_owned()], own_files: 1, index: None }
    }

    fn file_in_folder(path: &Path, folder: &Path) -> FoundCheckpoint {
        FoundCheckpoint {
            path: folder.to_owned(),
            folder: Some(folder.to_owned()),
            files: vec![path.to_owned()],
            own_files: 1,
            index: None,
        }
    }

    fn sharded(path: &Path, folder: Option<&Path>, index_path: &Path) -> Result<FoundCheckpoint> {
        let index = ShardIndex::read(index_path)?;
        let files: Vec<PathBuf> = index.shards().into_iter().map(|name| index_path.with_file_name(name)).collect();
        Ok(FoundCheckpoint {
            path: path.to_owned(),
            folder: folder.map(Path::to_owned),
            own_files: files.len(),
            files,
            index: Some((index_path.to_owned(), index)),
        })
    }

    /// Adds the files of other weights in the folder: of a second model, of a value head, or of trained embeddings.
    ///
    /// Files that hold the same weights in another format are left out.
    fn with_other_weights(mut self, dir: &Path) -> Result<FoundCheckpoint> {
        let own: BTreeSet<String> = self.files.iter().map(|path| safetensors_name(&file_name(path))).collect();
        let is_same = |path: &Path| {
            let name = safetensors_name(&file_name(path));
            let whole = without_extension(&name);
            own.contains(&name) || own.iter().any(|own| own.starts_with(&format!("{whole}-0")))
        };
        let mut others = entries(dir)?;
        others.retain(|path| !is_same(path));
        for module in module_folders(dir)? {
            others.extend(entries(&dir.join(module))?);
        }
        others.retain(|path| is_weights(path) && !has_extension(path, PICKLE) && !self.files.contains(path));
        self.files.extend(others);
        Ok(self)
    }

    /// Returns the name of a file, within the checkpoint's folder if it has one.
    pub(crate) fn name_of(&self, path: &Path) -> String {
        let within = self.folder.as_ref().and_then(|folder| path.strip_prefix(folder).ok());
        within.map_or_else(|| file_name(path), |name| name.to_string_lossy().into_owned())
    }
}

/// List of the modules of sentence-transformers, with the folder of each.
const MODULES: &str = "modules.json";

/// Lists the folders of a model's modules, such as `2_Dense`, relative to the model's folder.
///
/// # Errors
/// [`Error::Io`], and [`Error::Damaged`] if the list of modules is not JSON.
pub(super) fn module_folders(dir: &Path) -> Result<Vec<PathBuf>> {
    let Some(Value::Array(modules)) = json::read(&dir.join(MODULES))? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for path in modules.iter().filter_map(|module| module["path"].as_str()).map(PathBuf::from) {
        let is_inside = path.components().all(|component| matches!(component, Component::Normal(_)));
        if !path.as_os_str().is_empty() && is_inside && dir.join(&path).is_dir() {
            found.push(path);
        }
    }
    Ok(found)
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
        [dir] if dir.as_ref().is_dir() && !holds_parts_folders(dir.as_ref()) => match find_in_folder(dir.as_ref()) {
            Ok(Some(only)) => return Err(single_checkpoint(&only)),
            _ => find_all_in_folder(dir.as_ref())?,
        },
        [dir] if dir.as_ref().is_dir() => find_all_in_folder(dir.as_ref())?,
        paths => paths.iter().map(|path| find_one(path.as_ref())).collect::<Result<_>>()?,
    };
    match found.as_slice() {
        [only] => Err(single_checkpoint(only)),
        _ => Ok(found),
    }
}

/// Returns true if several folders of parts are in a folder, as DeepSpeed keeps them beside the name of the latest.
fn holds_parts_folders(dir: &Path) -> bool {
    let is_parts = |path: &&PathBuf| PartsFolder::of(path).is_some() && !is_state(path);
    let folders = entries(dir).unwrap_or_default();
    folders.iter().filter(is_parts).nth(1).is_some()
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

pub(super) fn find_one(path: &Path) -> Result<FoundCheckpoint> {
    if path.is_dir() {
        return find_in_folder(path)?
            .ok_or_else(|| Error::unexpected(path, "no weights are in this folder: name one that holds a checkpoint"));
    }
    fs::metadata(path).map_err(Error::io("read", path))?;
    if is_index(path) {
        return FoundCheckpoint::sharded(path, Some(parent_dir(path)), path);
    }
    if !is_weights(path) {
        let why = "not a file of weights: name a .safetensors file, its .index.json, or a .bin, .pt, .pth, .ckpt or \
                   .pkl file";
        return Err(Error::unexpected(path, why));
    }
    Ok(FoundCheckpoint::single_file(path))
}

/// Finds the checkpoint that a folder is; `None` if it holds no weights.
fn find_in_folder(dir: &Path) -> Result<Option<FoundCheckpoint>> {
    if PartsFolder::of(dir).is_some() {
        return Ok(Some(FoundCheckpoint::single_file(dir)));
    }
    for name in WEIGHT_NAMES {
        for extension in [SAFETENSORS, PYTORCH[0]] {
            let file = dir.join(format!("{name}.{extension}"));
            if file.is_file() {
                return FoundCheckpoint::file_in_folder(&file, dir).with_other_weights(dir).map(Some);
            }
            let index = dir.join(format!("{name}.{extension}{INDEX_SUFFIX}"));
            if index.is_file() {
                return FoundCheckpoint::sharded(dir, Some(dir), &index)?.with_other_weights(dir).map(Some);
            }
        }
    }
    match parts::model_folders(dir).as_slice() {
        [] => {}
        [folder] => {
            return Ok(Some(FoundCheckpoint { path: dir.to_owned(), ..FoundCheckpoint::single_file(folder) }));
        }
        [first, second, ..] => return Err(several_in_folder(dir, first, second)),
    }
    let entries = entries(dir)?;
    let indices: Vec<&PathBuf> = entries.iter().filter(|path| is_index(path)).collect();
    let files: Vec<&PathBuf> = entries.iter().filter(|path| is_weights(path)).collect();
    match (indices.as_slice(), files.as_slice()) {
        ([], []) => {
            let latest = parts::latest(dir)?;
            Ok(latest.map(|folder| FoundCheckpoint { path: dir.to_owned(), ..FoundCheckpoint::single_file(&folder) }))
        }
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
    let why = format!(
        "both `{first}` and `{second}` are in this folder: name the file of each checkpoint, or \
         this folder alone to take all that is in it"
    );
    Error::unexpected(dir, why)
}

/// Finds all checkpoints in a folder: files, shards with their indices, and folders.
pub(super) fn find_all_in_folder(dir: &Path) -> Result<Vec<FoundCheckpoint>> {
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
            if !is_state(path) {
                found.extend(find_in_folder(path)?);
            }
        } else if is_weights(path) && !shards.contains(path) {
            found.push(FoundCheckpoint::single_file(path));
        }
    }
    if found.is_empty() {
        return Err(Error::unexpected(dir, nothing_found(dir, &entries)));
    }
    found.sort_by(|a, b| natural::compare(&file_name(&a.path), &file_name(&b.path)).then_with(|| a.path.cmp(&b.path)));
    Ok(found)
}

/// Explains that a folder holds no checkpoints. Its folders may hold some, such as `checkpoint-500/unet`.
fn nothing_found(dir: &Path, folders: &[PathBuf]) -> String {
    let mut inner = BTreeSet::new();
    for path in folders.iter().filter(|path| path.is_dir()).flat_map(|folder| entries(folder).unwrap_or_default()) {
        if path.is_dir() && matches!(find_in_folder(&path), Ok(Some(_))) {
            inner.insert(file_name(&path));
        }
    }
    match inner.into_iter().collect::<Vec<String>>().as_slice() {
        [] => "no weights are in it, nor in its folders: name a folder of checkpoints".into(),
        names => {
            let pattern = dir.join("*").join(&names[0]);
            format!(
                "no weights are in it, nor in its folders, but in folders called {} within these: name them, as in {}",
                listed(names),
                shown(&pattern)
            )
        }
    }
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
    split_index(&file_name(path)).is_some()
}

/// Splits the name of an index of shards before its ending, `.index.json` or with a variant `.index.fp16.json`.
pub(crate) fn split_index(name: &str) -> Option<(&str, &str)> {
    let at = name.rfind(".index.").filter(|_| name.ends_with(".json"))?;
    let variant = name.get(at + 7..name.len() - 5).unwrap_or_default();
    (!variant.contains('.')).then(|| name.split_at(at))
}

/// Returns true if a file is one of weights, by its name.
pub(super) fn is_weights(path: &Path) -> bool {
    let known = is_pytorch(path) || path.extension().is_some_and(|extension| extension == SAFETENSORS);
    let name = file_name(path);
    known && path.is_file() && !without_extension(&name).ends_with(OPTIMIZER_STATE) && !is_state(path)
}

/// Returns true if a file or folder holds other state of a training, by its name.
fn is_state(path: &Path) -> bool {
    let name = file_name(path);
    TRAINING_STATE.iter().any(|prefix| name.starts_with(prefix))
}

/// Returns true if a file of weights is one of PyTorch's and not a safetensors file.
pub(super) fn is_pytorch(path: &Path) -> bool {
    PYTORCH.iter().any(|extension| has_extension(path, extension))
}

fn has_extension(path: &Path, extension: &str) -> bool {
    file_name(path).strip_suffix(extension).is_some_and(|stem| stem.len() > 1 && stem.ends_with('.'))
}

/// Returns the name of a file of weights as a safetensors file, by the conventions of Hugging Face's tools.
pub(crate) fn safetensors_name(name: &str) -> String {
    let stem = without_extension(name);
    match stem.strip_prefix("pytorch_model") {
        Some(rest) if !name.ends_with(SAFETENSORS) => format!("model{rest}.{SAFETENSORS}"),
        _ => format!("{stem}.{SAFETENSORS}"),
    }
}

/// Returns true if a file has the same name in every checkpoint, so that only the folder's name identifies it.
pub(super) fn has_usual_name(path: &Path) -> bool {
    let name = file_name(path);
    WEIGHT_NAMES.iter().any(|usual| name.strip_prefix(usual).is_some_and(|rest| rest.starts_with(['.', '-'])))
}

/// Returns true for a name of weights, without extension, that the tools of Hugging Face expect in a folder.
pub(crate) fn is_usual_name(name: &str) -> bool {
    WEIGHT_NAMES.contains(&name)
}

/// Returns a name without the extension of a file of weights or of an index.
pub(crate) fn without_extension(name: &str) -> &str {
    let name = split_index(name).map_or(name, |(stem, _)| stem);
    let known = PYTORCH.iter().copied().chain([SAFETENSORS]);
    let stems = known.filter_map(|extension| name.strip_suffix(extension)?.strip_suffix('.'));
    stems.min_by_key(|stem| stem.len()).unwrap_or(name)
}
