//! Files of PyTorch before 1.6, and storages that a plain pickle holds in the same form.
//!
//! Five pickles follow each other: a magic number, a version, the system that wrote it, the value, and the keys of the
//! storages. Then come the storages in the order of their keys, each after its number of elements.

use std::collections::HashMap;
use std::ops::Range;

use super::pickle::{MemoryBudget, Node, Pickle, PickleError};
use super::storage::{self, StorageRef};

/// First pickle of such a file: protocol 2, and the number `0x1950a86a20f9469cfc6c`.
pub(super) const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

/// Value of a file, and the places of the storages that it refers to.
pub(super) struct LegacyFile {
    pub pickle: Pickle,
    pub storages: HashMap<String, Range<usize>>,
}

/// Reads the file that `range` of another file holds, or all of it.
///
/// # Errors
/// [`PickleError`] as for a pickle, and if a storage is missing or leads out of the range.
pub(super) fn read(file: &[u8], range: Range<usize>, memory: &mut MemoryBudget) -> Result<LegacyFile, PickleError> {
    let file = &file[..range.end];
    let mut at = range.start;
    let invalid = |at, why| PickleError::Invalid { at, why };
    if !file[at..].starts_with(MAGIC) {
        return Err(invalid(at, "not a file of `torch.save`"));
    }
    at += MAGIC.len();
    let _version = Pickle::parse(file, &mut at, memory)?;
    let system = Pickle::parse(file, &mut at, memory)?;
    if let Some(little) = system.get(system.root(), "little_endian")
        && matches!(system.node(little), Node::Bool(false))
    {
        return Err(invalid(at, "its numbers are big endian"));
    }
    let pickle = Pickle::parse(file, &mut at, memory)?;
    let keys = Pickle::parse(file, &mut at, memory)?;
    let references = pickle.references().filter_map(|id| StorageRef::new(&pickle, id));
    let sizes: HashMap<&str, usize> = references.map(|r| (r.key, storage::element_size(r.kind).unwrap_or(0))).collect();
    let mut storages = HashMap::new();
    for &key in keys.items(keys.root()).ok_or(invalid(at, "it has no list of storages"))? {
        let key = keys.text(key).ok_or(invalid(at, "a storage has no key"))?;
        let count = file.get(at..at + 8).ok_or(invalid(at, "it ends early"))?;
        let count = u64::from_le_bytes(count.try_into().unwrap_or_default());
        let size = sizes.get(key).copied().unwrap_or(0);
        let start = at + 8;
        let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(size));
        let end = bytes.and_then(|bytes| start.checked_add(bytes)).filter(|&end| size > 0 && end <= file.len());
        let end = end.ok_or(invalid(start, "a storage leads out of the file"))?;
        memory.take(key.len() + 64)?;
        storages.insert(key.to_owned(), start..end);
        at = end;
    }
    Ok(LegacyFile { pickle, storages })
}
