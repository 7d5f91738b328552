//! Writing safetensors files block by block, with a checksum, whole or not at all.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::atomic::AtomicFile;
use super::directory::Stem;
use super::layout::{FileLayout, Placed, TensorSpec};
use super::meta::{CHECKSUM, Meta};
use super::read::format_checksum;
use super::shards;
use crate::error::Result;

/// Bytes that are filled, hashed and written at a time.
const BLOCK: usize = 32 << 20;

/// Fills a stretch of a tensor: its index in the list of specs, the range of its bytes, and where they go.
///
/// A stretch never cuts an element: tensors lie in order of falling element size, so each begins at a multiple of its
/// own, and blocks end at multiples of the largest.
pub type Fill<'a> = dyn Fn(usize, Range<usize>, &mut [u8]) + Sync + 'a;

/// Writes one file.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) and those of [`FileLayout`]; nothing is left behind then.
pub fn write_file(
    path: &Path,
    specs: Vec<TensorSpec>,
    mut metadata: BTreeMap<String, String>,
    fill: &Fill<'_>,
) -> Result<()> {
    let layout = FileLayout::new(specs)?;
    // The header comes first in the file and holds the checksum of what follows: it is written last, over its place.
    metadata.insert(CHECKSUM.into(), format_checksum(&blake3::Hasher::new()));
    let data = layout.header(&metadata)?.len() as u64;
    let file = AtomicFile::create(path)?;
    let checksum = write_data(&file, data, &layout, fill)?;
    metadata.insert(CHECKSUM.into(), checksum);
    file.write_at(0, &layout.header(&metadata)?)?;
    file.commit()
}

fn write_data(file: &AtomicFile, data: u64, layout: &FileLayout, fill: &Fill<'_>) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK.min(layout.data_len())];
    for start in (0..layout.data_len()).step_by(BLOCK) {
        let end = layout.data_len().min(start + BLOCK);
        let block = &mut block[..end - start];
        fill_block(block, start, layout.places(), fill);
        let (_, written) =
            rayon::join(|| hasher.update_rayon(block), || file.write_block_at(data + start as u64, block));
        written?;
    }
    Ok(format_checksum(&hasher))
}

/// Fills the bytes of the data section from `start` on.
fn fill_block(block: &mut [u8], start: usize, places: &[Placed], fill: &Fill<'_>) {
    let end = start + block.len();
    let first = places.partition_point(|place| place.range.end <= start);
    for Placed { index, range } in places[first..].iter().take_while(|place| place.range.start < end) {
        let (from, to) = (range.start.max(start), range.end.min(end));
        if from < to {
            fill(*index, from - range.start..to - range.start, &mut block[from - start..to - start]);
        }
    }
}

/// Writes a snapshot into a run, in shards where it is larger than `shard_size`, and returns its files.
///
/// # Errors
/// As [`write_file`]. Shards written before the failure stay and are not taken for a snapshot: the set is incomplete.
pub fn write_snapshot(
    dir: &Path,
    stem: Stem,
    specs: Vec<TensorSpec>,
    meta: &Meta,
    shard_size: u64,
    fill: &Fill<'_>,
) -> Result<Vec<PathBuf>> {
    let shards = shards::split(&specs, shard_size)?;
    if let [_] = shards.as_slice() {
        let path = dir.join(stem.file_name());
        write_file(&path, specs, meta.to_strings(), fill)?;
        return Ok(vec![path]);
    }
    let mut paths = Vec::with_capacity(shards.len());
    for (i, members) in shards.iter().enumerate() {
        let path = dir.join(stem.shard_name(i + 1, shards.len()));
        let own: Vec<TensorSpec> = members.iter().map(|&m| specs[m].clone()).collect();
        let meta = shards::restrict(meta, &own);
        write_file(&path, own, meta.to_strings(), &|i, range, dst| fill(members[i], range, dst))?;
        paths.push(path);
    }
    shards::write_index(dir, stem, &specs, &shards)?;
    Ok(paths)
}
