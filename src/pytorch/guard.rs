//! Cheap checks that refuse files which would take too much memory.
//!
//! The reader itself refuses pickles that fill the memory by repetition or the stack by nesting.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use pytorch_reader::{PickleValue, Tensor};
use zip::{CompressionMethod, ZipArchive};

use super::REMEDY;
use crate::error::{Error, Result};
use crate::fs::check_regular;

/// Most dimensions of a PyTorch tensor.
const MAX_RANK: usize = 64;

/// Largest ratio of a file's tensors to its length. It exceeds 1 if tensors share elements.
const MAX_GROWTH: u64 = 4;

/// Bytes of tensors that are allowed whatever the file's length.
const ALWAYS_ALLOWED: u64 = 1 << 20;

/// Checks a file before it is parsed, and returns its length in bytes.
///
/// # Errors
/// - [`Error::Io`] if it cannot be read.
/// - [`Error::Damaged`] if PyTorch does not write such files.
/// - [`Error::Unexpected`] if it is not a regular file, or if its pickle is compressed.
pub(super) fn check_file(path: &Path) -> Result<u64> {
    let metadata = check_regular(path)?;
    if metadata.len() == 0 {
        return Err(Error::damaged(path, "the file is empty"));
    }
    let mut start = Vec::new();
    File::open(path).and_then(|file| file.take(262).read_to_end(&mut start)).map_err(Error::io("read", path))?;
    if start.starts_with(b"PK") {
        check_uncompressed(path)?;
    } else if start.get(257..262) == Some(b"ustar") {
        return Err(Error::damaged(path, "a TAR archive, which no supported tool writes"));
    }
    Ok(metadata.len())
}

/// Checks that the pickle is not compressed: it could expand to a thousand times the file.
fn check_uncompressed(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let damaged = |error: zip::result::ZipError| Error::damaged(path, error);
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(damaged)?;
        if entry.name_raw().ends_with(b"data.pkl") && entry.compression() != CompressionMethod::Stored {
            let why = format!("`data.pkl` is compressed, which `torch.save` never does: {REMEDY_COMPRESSED}");
            return Err(Error::unexpected(path, why));
        }
    }
    Ok(())
}

const REMEDY_COMPRESSED: &str = "if you trust the file, load it with PyTorch and save it again";

/// Checks the parsed tensors of a file of `length` bytes before any element is read.
///
/// # Errors
/// [`Error::Unexpected`] for a tensor of too many dimensions, for tensors that repeat few elements, and for tensors
/// that share a name.
pub(super) fn check_tensors(
    path: &Path,
    length: u64,
    root: &HashMap<String, PickleValue>,
    tensors: &HashMap<String, Tensor>,
) -> Result<()> {
    let too_deep = tensors.iter().filter(|(_, tensor)| tensor.shape().len() > MAX_RANK).map(|(name, _)| name).min();
    if let Some(name) = too_deep {
        let why = format!("`{name}` has more than {MAX_RANK} dimensions, the most that PyTorch allows: {REMEDY}");
        return Err(Error::unexpected(path, why));
    }
    let bytes = tensors.values().map(byte_len).fold(0, u64::saturating_add);
    if bytes > length.saturating_mul(MAX_GROWTH).saturating_add(ALWAYS_ALLOWED) {
        let why = format!(
            "its tensors take {bytes} bytes and the file only {length}, so they repeat few elements: if you trust the \
             file, load it with PyTorch, make them contiguous and save it again"
        );
        return Err(Error::unexpected(path, why));
    }
    let entries: usize = root.values().map(tensor_count).sum();
    if entries != tensors.len() {
        let why = format!("only {} of its {entries} tensors have distinct names: {REMEDY}", tensors.len());
        return Err(Error::unexpected(path, why));
    }
    Ok(())
}

/// Size of a tensor's elements in bytes, once read.
fn byte_len(tensor: &Tensor) -> u64 {
    let element = super::dtype(tensor.dtype()).bitsize() as u64 / 8;
    tensor.shape().iter().fold(element, |bytes, &extent| bytes.saturating_mul(extent as u64))
}

/// Number of tensors in an entry, at any depth.
fn tensor_count(value: &PickleValue) -> usize {
    match value {
        PickleValue::Dict(entries) => entries.values().map(tensor_count).sum(),
        PickleValue::List(values) => values.iter().map(tensor_count).sum(),
        PickleValue::Unsupported(kind) => (kind == super::TENSOR).into(),
        _ => 0,
    }
}
