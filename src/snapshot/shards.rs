//! Snapshots in several files, in Hugging Face's format.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::id::SnapshotId;
use super::index::ShardIndex;
use super::layout::FileLayout;
use super::meta::Meta;
use crate::error::Result;
use crate::fs::AtomicFile;
use crate::tensor::{TensorSpec, byte_size};

/// Assigns tensors to shards of at most `shard_size` bytes, in the order of a single file, and returns their indices in
/// `specs`.
///
/// A larger tensor gets a shard of its own. There is at least one shard.
pub(super) fn split(specs: &[TensorSpec], shard_size: u64) -> Result<Vec<Vec<usize>>> {
    let layout = FileLayout::new(specs.to_vec())?;
    let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
    let mut filled = 0;
    for place in layout.places() {
        let size = place.range.len() as u64;
        if filled > 0 && filled + size > shard_size {
            shards.push(Vec::new());
            filled = 0;
        }
        shards.last_mut().expect("there is at least one shard").push(place.index);
        filled += size;
    }
    Ok(shards)
}

/// Returns the part of the metadata that concerns the tensors of one shard.
pub(super) fn restrict(meta: &Meta, specs: &[TensorSpec]) -> Meta {
    let names: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    let mut meta = meta.clone();
    meta.dtypes.retain(|name, _| names.contains(name.as_str()));
    meta.copied.retain(|name| names.contains(name.as_str()));
    meta.tied.retain(|_, kept| names.contains(kept.as_str()));
    meta
}

/// Returns the index of a snapshot, given shard (counted from 0), name and bytes of each tensor.
pub(super) fn index<'a>(
    id: SnapshotId,
    shards: usize,
    tensors: impl Iterator<Item = (usize, &'a str, usize)>,
) -> ShardIndex {
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0;
    for (shard, name, bytes) in tensors {
        weight_map.insert(name.to_owned(), id.shard_name(shard + 1, shards));
        total_size += bytes;
    }
    ShardIndex::default().with_tensors(weight_map, total_size)
}

/// Writes the index that Hugging Face's loaders look for. This crate reads the shards themselves.
pub(super) fn write_index(dir: &Path, id: SnapshotId, specs: &[TensorSpec], shards: &[Vec<usize>]) -> Result<()> {
    let mut tensors = Vec::with_capacity(specs.len());
    for (shard, members) in shards.iter().enumerate() {
        for &member in members {
            let TensorSpec { name, dtype, shape } = &specs[member];
            tensors.push((shard, name.as_str(), byte_size(name, *dtype, shape)?));
        }
    }
    let file = AtomicFile::create(&dir.join(id.index_name()))?;
    file.write_at(0, index(id, shards.len(), tensors.into_iter()).to_json().as_bytes())?;
    file.commit()
}
