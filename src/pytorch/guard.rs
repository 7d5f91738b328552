//! Checks that refuse files which would take too much memory, before they are parsed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

use pytorch_reader::{PickleValue, Tensor};
use zip::{CompressionMethod, ZipArchive};

use super::pickle_memory::{self, Held};
use super::{REMEDY, archive_directory};
use crate::error::{Error, Result};
use crate::fs::check_regular;

/// Most dimensions of a PyTorch tensor.
const MAX_RANK: usize = 64;

/// Largest ratio of a file's tensors to its length. It exceeds 1 if tensors share elements.
const MAX_GROWTH: u64 = 4;

/// Bytes of tensors that are allowed whatever the file's length.
const ALWAYS_ALLOWED: u64 = 1 << 20;

/// Most bytes of values for each byte of a file, and the bounds of their sum.
const VALUES_PER_BYTE: u64 = 8;
const LEAST_VALUES: u64 = 128 << 20;
const MOST_VALUES: u64 = 1 << 30;

/// Most bytes of the copies that the parser memorizes. A file of as many tensors as it can parse has less.
const MOST_COPIES: u64 = 320 << 20;

/// Number of pickles at the start of a file of PyTorch before 1.6.
const LEGACY_PICKLES: usize = 5;

/// Checks a file before it is parsed, and returns its length in bytes.
///
/// # Errors
/// - [`Error::Io`] if it cannot be read.
/// - [`Error::Damaged`] if PyTorch does not write such files.
/// - [`Error::Unexpected`] if it is not a regular file, if its pickle is compressed, or if its values take far more
///   memory than the file.
pub(super) fn check_file(path: &Path) -> Result<u64> {
    let length = check_regular(path)?.len();
    if length == 0 {
        return Err(Error::damaged(path, "the file is empty"));
    }
    let open = || File::open(path).map_err(Error::io("read", path));
    let mut start = Vec::new();
    open()?.take(262).read_to_end(&mut start).map_err(Error::io("read", path))?;
    let limit =
        Held { values: length.saturating_mul(VALUES_PER_BYTE).clamp(LEAST_VALUES, MOST_VALUES), copies: MOST_COPIES };
    if start.starts_with(b"PK") {
        check_archive(path, open()?, limit)?;
    } else if start.get(257..262) == Some(b"ustar") {
        return Err(Error::damaged(path, "a TAR archive, which no supported tool writes"));
    } else {
        let mut reader = BufReader::new(open()?);
        let mut held = Held::default();
        for _ in 0..LEGACY_PICKLES {
            if !check_pickle(path, &mut reader, &mut held, limit)? {
                break;
            }
        }
    }
    Ok(length)
}

/// Checks the entries of an archive and its pickle.
fn check_archive(path: &Path, mut file: File, limit: Held) -> Result<()> {
    let directory = archive_directory::held(&mut file).map_err(|error| match error.raw_os_error() {
        Some(_) => Error::io("read", path)(error),
        None if error.kind() == ErrorKind::Unsupported => Error::unexpected(path, error.to_string()),
        None => Error::damaged(path, error),
    })?;
    check_held(path, Held { values: directory, copies: 0 }, limit)?;
    let damaged = |error: zip::result::ZipError| Error::damaged(path, error);
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(damaged)?;
        if !entry.name_raw().ends_with(b"data.pkl") {
            continue;
        }
        // A compressed pickle could expand to a thousand times the file.
        if entry.compression() != CompressionMethod::Stored {
            let why = format!("`data.pkl` is compressed, which `torch.save` never does: {REMEDY_COMPRESSED}");
            return Err(Error::unexpected(path, why));
        }
        let mut held = Held { values: directory.saturating_add(entry.size()), copies: 0 };
        check_pickle(path, &mut BufReader::new(entry), &mut held, limit)?;
    }
    Ok(())
}

/// Checks the memory of one pickle beside what is held already. Returns true if another pickle may follow.
fn check_pickle(path: &Path, reader: &mut impl BufRead, held: &mut Held, limit: Held) -> Result<bool> {
    let is_complete = pickle_memory::walk(reader, held, limit).map_err(Error::io("read", path))?;
    check_held(path, *held, limit)?;
    Ok(is_complete)
}

fn check_held(path: &Path, held: Held, limit: Held) -> Result<()> {
    for (what, bytes, most) in [("values", held.values, limit.values), ("repeated values", held.copies, limit.copies)] {
        if bytes > most {
            let why = format!(
                "its {what} would take over {} MB of memory, the limit of a file of this length: if you trust it, \
                 load it with PyTorch and save the model's state dict alone",
                most / 1_000_000
            );
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
