//! Files that would cost more to open than they are worth, refused by cheap checks. The reader itself refuses pickles that
//! repeat what they hold until it fills the memory, or nest it until it fills the stack.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use pytorch_reader::{PickleValue, Tensor};
use zip::{CompressionMethod, ZipArchive};

use super::REMEDY;
use crate::error::{Error, Result};
use crate::fs::check_regular;

/// The dimensions that a tensor of PyTorch can have.
const MAX_RANK: usize = 64;

/// How many times its own length a file's tensors may take, where they share elements; and what is never too much.
const MAX_GROWTH: u64 = 4;
const SMALL: u64 = 1 << 20;

/// Checks a file before anything is parsed, and returns its length.
///
/// # Errors
/// [`Error::Io`], [`Error::Damaged`] for what PyTorch does not write, [`Error::Unexpected`] for what is no file, or packed.
pub(super) fn check_file(path: &Path) -> Result<u64> {
    let metadata = check_regular(path)?;
    if metadata.len() == 0 {
        return Err(Error::damaged(path, "the file is empty"));
    }
    let mut start = Vec::new();
    File::open(path).and_then(|file| file.take(262).read_to_end(&mut start)).map_err(Error::io("read", path))?;
    if start.starts_with(b"PK") {
        check_stored(path)?;
    } else if start.get(257..262) == Some(b"ustar") {
        return Err(Error::damaged(path, "a TAR archive, which none of the tools writes"));
    }
    Ok(metadata.len())
}

/// Packed, a pickle may be a thousand times as long as the file.
fn check_stored(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let damaged = |error: zip::result::ZipError| Error::damaged(path, error);
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(damaged)?;
        if entry.name_raw().ends_with(b"data.pkl") && entry.compression() != CompressionMethod::Stored {
            let why = format!("`data.pkl` is compressed, and `torch.save` never does that: {REMEDY_PACKED}");
            return Err(Error::unexpected(path, why));
        }
    }
    Ok(())
}

const REMEDY_PACKED: &str = "where you trust the file, load it with PyTorch and save it again";

/// Checks what was parsed, before any element is read.
///
/// # Errors
/// [`Error::Unexpected`].
pub(super) fn check_tensors(
    path: &Path,
    length: u64,
    root: &HashMap<String, PickleValue>,
    tensors: &HashMap<String, Tensor>,
) -> Result<()> {
    let deep = tensors.iter().filter(|(_, tensor)| tensor.shape().len() > MAX_RANK).map(|(name, _)| name).min();
    if let Some(name) = deep {
        let why = format!("`{name}` has more than {MAX_RANK} dimensions, which no tensor of PyTorch has: {REMEDY}");
        return Err(Error::unexpected(path, why));
    }
    let bytes = tensors.values().map(size).fold(0, u64::saturating_add);
    if bytes > length.saturating_mul(MAX_GROWTH).saturating_add(SMALL) {
        let why = format!(
            "its tensors take {bytes} bytes, and the file has {length}: they repeat few elements; where you trust the file, \
             load it with PyTorch, make them contiguous and save it again"
        );
        return Err(Error::unexpected(path, why));
    }
    let held: usize = root.values().map(count).sum();
    if held != tensors.len() {
        let why = format!("of its {held} tensors only {} have a name of their own: {REMEDY}", tensors.len());
        return Err(Error::unexpected(path, why));
    }
    Ok(())
}

/// The bytes of a tensor's elements, as they would be read.
fn size(tensor: &Tensor) -> u64 {
    let element = super::dtype(tensor.dtype()).bitsize() as u64 / 8;
    tensor.shape().iter().fold(element, |bytes, &extent| bytes.saturating_mul(extent as u64))
}

/// How many tensors an entry holds.
fn count(value: &PickleValue) -> usize {
    match value {
        PickleValue::Dict(entries) => entries.values().map(count).sum(),
        PickleValue::List(values) => values.iter().map(count).sum(),
        PickleValue::Unsupported(kind) => (kind == super::TENSOR).into(),
        _ => 0,
    }
}
