//! Safetensors files that each hold parts of tensors, as `HuggingFaceStorageWriter` of PyTorch writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::names::file_name;
use super::options::ReadOptions;
use super::parts::is_shard;
use crate::error::{Error, Result, listed};
use crate::fs::Mapping;
use crate::pytorch::{Rectangle, TensorFile};
use crate::snapshot::StoredFile;

/// Key of the metadata with the place of each part.
pub(super) const SHARDING: &str = "DCP_SHARDING_INFO";

const REMEDY: &str = "the checkpoint is incomplete";

/// Place of a part within its tensor.
#[derive(Deserialize)]
struct SavedPart {
    saved_offsets: Vec<usize>,
}

/// Reads the tensors of a folder without their elements, and the names of those that were left out.
///
/// # Errors
/// [`Error::Io`], and [`Error::Damaged`] for a set that is not whole.
pub(super) fn read(folder: &Path, options: &ReadOptions) -> Result<(TensorFile, Vec<String>)> {
    let paths = shards(folder)?;
    let mut maps: Vec<Mapping> = Vec::with_capacity(paths.len());
    let mut rectangles = Vec::new();
    let mut left_out = BTreeSet::new();
    for (i, path) in paths.iter().enumerate() {
        let file = StoredFile::open(path)?;
        let places = places(&file)?;
        for (name, tensor) in file.tensors().iter() {
            if options.leave_out.contains(name) {
                left_out.insert(name.to_owned());
                continue;
            }
            let place = places.get(name).ok_or_else(|| {
                Error::damaged(path, format!("the place of tensor `{name}` is not in its `{SHARDING}`"))
            })?;
            rectangles.push(Rectangle {
                name: name.to_owned(),
                file: i,
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                offset: place.saved_offsets.clone(),
                start: file.start(tensor),
            });
        }
        maps.push(file.into_mapping());
    }
    let tensors = TensorFile::from_rectangles(folder, maps, rectangles)?;
    Ok((tensors, left_out.into_iter().collect()))
}

/// Reads the places of a file's parts.
fn places(file: &StoredFile) -> Result<BTreeMap<String, SavedPart>> {
    let text = file.metadata().get(SHARDING).ok_or_else(|| {
        Error::damaged(file.path(), format!("it has no `{SHARDING}` in its metadata, as the other shards have"))
    })?;
    serde_json::from_str(text).map_err(|error| Error::damaged(file.path(), format!("its `{SHARDING}`: {error}")))
}

/// Returns true if all tensors of a file begin at their first element, as those of one process that saved alone do.
///
/// # Errors
/// [`Error::Damaged`].
pub(super) fn is_whole(file: &StoredFile) -> Result<bool> {
    let begins = places(file)?.values().all(|part| part.saved_offsets.iter().all(|&offset| offset == 0));
    Ok(begins && !is_shard(&file_name(file.path())))
}

/// Lists the shards of a folder, whose numbers must be 1, 2 and so on.
///
/// # Errors
/// [`Error::Damaged`] with the numbers that are missing.
fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    let mut numbers = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        let name = file_name(&path);
        if is_shard(&name) {
            numbers.extend(name.split('-').nth(1).and_then(|number| number.parse::<u32>().ok()));
            paths.push(path);
        }
    }
    paths.sort();
    let last = numbers.last().copied().unwrap_or(0);
    let missing = (1..=last).filter(|number| !numbers.contains(number)).take(MOST_MISSING);
    let missing: Vec<String> = missing.map(|number| format!("shard-{number:05}-*.safetensors")).collect();
    if !missing.is_empty() {
        return Err(Error::damaged(folder, format!("{} is missing: {REMEDY}", listed(&missing))));
    }
    Ok(paths)
}

/// Most missing shards that an error counts.
const MOST_MISSING: usize = 100;
