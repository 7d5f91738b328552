//! Snapshots in several files, by Hugging Face's conventions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::directory::SnapshotId;
use super::layout::FileLayout;
use super::meta::Meta;
use crate::error::Result;
use crate::fs::AtomicFile;
use crate::tensor::TensorSpec;
use crate::tensor::byte_size;

/// Deals tensors out to shards of at most `shard_size` bytes, in the order of a single file; a tensor that is larger
/// has a shard to itself. Always at least one shard.
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
        shards.last_mut().expect("there is one").push(place.index);
        filled += size;
    }
    Ok(shards)
}

/// The metadata of a shard: only what concerns its tensors.
pub(super) fn restrict(meta: &Meta, specs: &[TensorSpec]) -> Meta {
    let names: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    let mut meta = meta.clone();
    meta.dtypes.retain(|name, _| names.contains(name.as_str()));
    meta.copied.retain(|name| names.contains(name.as_str()));
    meta.tied.retain(|_, kept| names.contains(kept.as_str()));
    meta
}

/// Writes the index that Hugging Face's loaders look for; the shards themselves remain what counts.
pub(super) fn write_index(dir: &Path, stem: SnapshotId, specs: &[TensorSpec], shards: &[Vec<usize>]) -> Result<()> {
    let mut index = Index::new(stem, shards.len());
    for (shard, members) in shards.iter().enumerate() {
        for &member in members {
            let TensorSpec { name, dtype, shape } = &specs[member];
            index.add(shard, name, byte_size(name, *dtype, shape)?);
        }
    }
    let file = AtomicFile::create(&dir.join(stem.index_name()))?;
    file.write_at(0, index.text().as_bytes())?;
    file.commit()
}

/// What the index of a snapshot in shards says.
pub(super) struct Index<'a> {
    stem: SnapshotId,
    shards: usize,
    total_size: usize,
    weight_map: BTreeMap<&'a str, String>,
}

impl<'a> Index<'a> {
    pub(super) fn new(stem: SnapshotId, shards: usize) -> Index<'a> {
        Index { stem, shards, total_size: 0, weight_map: BTreeMap::new() }
    }

    /// Adds a tensor of so many bytes; shards are counted from 0.
    pub(super) fn add(&mut self, shard: usize, name: &'a str, bytes: usize) {
        self.total_size += bytes;
        self.weight_map.insert(name, self.stem.shard_name(shard + 1, self.shards));
    }

    pub(super) fn text(&self) -> String {
        let Index { total_size, weight_map, .. } = self;
        let index = serde_json::json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        format!("{index:#}\n")
    }
}
