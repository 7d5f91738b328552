//! File of PyTorch, mapped: its pickle, and the places of its storages.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::archive::Archive;
use super::file_kind;
use super::legacy;
use super::pickle::{MemoryBudget, Pickle, PickleError};
use super::tensor::{TensorReader, is_tensor};
use crate::error::{Error, Result};
use crate::fs::{Mapping, check_regular};

/// Most bytes of values for each byte of a file, and the bounds of their sum.
const VALUES_PER_BYTE: usize = 8;
const LEAST_VALUES: usize = 128 << 20;
const MOST_VALUES: usize = 1 << 30;

/// Places of storages in a file, by their keys.
pub(super) type Storages = HashMap<String, Range<usize>>;

/// File whose pickle is parsed.
#[derive(Debug)]
pub(super) struct PickledFile {
    pub path: PathBuf,
    pub map: Mapping,
    pub pickle: Pickle,
    pub storages: Storages,
}

impl PickledFile {
    /// Maps a file and parses its pickle.
    ///
    /// # Errors
    /// - [`Error::Io`] if the file cannot be read.
    /// - [`Error::Damaged`] if it is not a complete file of PyTorch.
    /// - [`Error::Unexpected`] if it is not a regular file, is known to be something else, or if its values would take
    ///   far more memory than the file.
    pub(super) fn open(path: &Path) -> Result<PickledFile> {
        let map = map_file(path)?;
        if let Some(kind) = file_kind::foreign(&map) {
            return Err(Error::unexpected(path, format!("this is {kind}")));
        }
        let limit = values_limit(map.len());
        let mut memory = MemoryBudget::new(limit);
        let (pickle, storages) = if map.starts_with(b"PK\x03\x04") || map.starts_with(b"PK\x05\x06") {
            parse_archive(path, &map, &mut memory, limit)
        } else if map.starts_with(legacy::MAGIC) {
            let read = legacy::read(&map, 0..map.len(), &mut memory);
            read.map(|read| (read.pickle, read.storages)).map_err(|error| pickle_error(path, error, limit))
        } else {
            // A plain pickle, which holds its storages as bytes.
            let pickle = Pickle::parse(&map, &mut 0, &mut memory).map_err(|error| pickle_error(path, error, limit))?;
            if !pickle.ids().any(|id| is_tensor(&pickle, id)) {
                return Err(Error::damaged(path, "a pickle that holds no tensor, not a file of `torch.save`"));
            }
            Ok((pickle, HashMap::new()))
        }?;
        Ok(PickledFile { path: path.to_owned(), map, pickle, storages })
    }

    /// Maps a file and parses it as a plain pickle, which need not hold a tensor.
    ///
    /// # Errors
    /// As [`PickledFile::open`].
    pub(super) fn open_plain(path: &Path) -> Result<PickledFile> {
        let map = map_file(path)?;
        let limit = values_limit(map.len());
        let parsed = Pickle::parse(&map, &mut 0, &mut MemoryBudget::new(limit));
        let pickle = parsed.map_err(|error| pickle_error(path, error, limit))?;
        Ok(PickledFile { path: path.to_owned(), map, pickle, storages: HashMap::new() })
    }

    /// Calls a function with the tensors of the file.
    pub(super) fn with_tensors<T>(&self, read: impl FnOnce(&TensorReader<'_>) -> T) -> T {
        let place = |key: &str| self.storages.get(key).cloned();
        read(&TensorReader { file: &self.map, pickle: &self.pickle, place: &place })
    }
}

/// Returns the bytes that the values of a file may take.
fn values_limit(length: usize) -> usize {
    length.saturating_mul(VALUES_PER_BYTE).clamp(LEAST_VALUES, MOST_VALUES)
}

/// Maps a file.
///
/// # Errors
/// [`Error::Io`], [`Error::Damaged`] if it is empty, and [`Error::Unexpected`] if it is not a regular file.
pub(super) fn map_file(path: &Path) -> Result<Mapping> {
    if check_regular(path)?.len() == 0 {
        return Err(Error::damaged(path, "the file is empty"));
    }
    let file = File::open(path).map_err(Error::io("read", path))?;
    Mapping::new(&file, path).map_err(Error::io("map", path))
}

/// Reads the pickle of an archive, and the places of its storages.
///
/// # Errors
/// As [`PickledFile::open`].
pub(super) fn parse_archive(
    path: &Path,
    file: &[u8],
    memory: &mut MemoryBudget,
    limit: usize,
) -> Result<(Pickle, Storages)> {
    let archive = Archive::new(file).map_err(|why| Error::damaged(path, why))?;
    let pickle = archive.names().find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"));
    let Some(pickle) = pickle else {
        let why = "a ZIP archive that `torch.save` did not write: unpack it, and name the files in it";
        return Err(Error::unexpected(path, why));
    };
    let folder = pickle.strip_suffix("data.pkl").unwrap_or_default();
    if archive.has(&format!("{folder}constants.pkl")) {
        let why = "a TorchScript program: load it with `torch.jit.load`, and save its `state_dict()`";
        return Err(Error::unexpected(path, why));
    }
    if archive.get(&format!("{folder}byteorder")).is_some_and(|range| &file[range] == b"big") {
        let why = "its numbers are big endian: load it with PyTorch on this machine and save it again";
        return Err(Error::unexpected(path, why));
    }
    let range = stored(path, &archive, pickle)?;
    let mut at = range.start;
    let parsed = Pickle::parse(&file[..range.end], &mut at, memory);
    let parsed = parsed.map_err(|error| pickle_error(path, error, limit))?;
    let data = format!("{folder}data/");
    let mut storages = HashMap::new();
    for name in archive.names() {
        if let Some(key) = name.strip_prefix(&data) {
            storages.insert(key.to_owned(), stored(path, &archive, name)?);
        }
    }
    Ok((parsed, storages))
}

/// Returns the place of an entry.
///
/// # Errors
/// [`Error::Unexpected`] if it is compressed.
fn stored(path: &Path, archive: &Archive<'_>, name: &str) -> Result<Range<usize>> {
    archive.get(name).ok_or_else(|| {
        let why = format!(
            "its entry `{name}` is compressed, which `torch.save` never does: if you trust the file, load it with \
             PyTorch and save it again"
        );
        Error::unexpected(path, why)
    })
}

fn pickle_error(path: &Path, error: PickleError, limit: usize) -> Error {
    match error {
        PickleError::Invalid { at, why } => Error::damaged(path, format!("its pickle is wrong at byte {at}: {why}")),
        PickleError::TooLarge => {
            let why = format!(
                "its values would take over {} MB of memory, the limit of a file of this length: if you trust it, \
                 load it with PyTorch and save the model's state dict alone",
                limit / 1_000_000
            );
            Error::unexpected(path, why)
        }
    }
}
