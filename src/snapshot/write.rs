//! Writing safetensors files block by block, with checksums, atomically.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;

use rayon::prelude::*;

use super::checksum;
use super::id::SnapshotId;
use super::layout::{FileLayout, PlacedTensor};
use super::meta::Meta;
use super::part_places::{PartPlace, place_strings};
use super::shards;
use crate::error::{Error, Result};
use crate::fs::AtomicFile;
use crate::tensor::TensorSpec;

/// Number of bytes that are filled, hashed and written at a time.
const BLOCK: usize = 2 << 20;

/// Number of bytes that one thread fills at a time.
const PIECE: usize = 256 << 10;

/// Number of blocks in memory: one being filled, one being written, and one to even out their speeds.
const BLOCKS: usize = 3;

/// Function that fills a range of a tensor's bytes: its index in the list of specs, the range, and the destination.
///
/// A range never splits an element: tensors are in order of decreasing element size, so each begins at a multiple of
/// its own, and pieces end at multiples of the largest.
pub type Fill<'a> = dyn Fn(usize, Range<usize>, &mut [u8]) + Sync + 'a;

/// Writes one file.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) and those of [`FileLayout`]; no file is left behind.
pub fn write_file(
    path: &Path,
    specs: Vec<TensorSpec>,
    mut metadata: BTreeMap<String, String>,
    fill: &Fill<'_>,
) -> Result<()> {
    let layout = FileLayout::new(specs)?;
    // The header comes first in the file and holds the checksum of the data, so it is written last.
    checksum::reserve(&mut metadata);
    let data = layout.header(&metadata)?.len() as u64;
    let file = AtomicFile::create(path)?;
    let hasher = write_data(&file, data, &layout, fill)?;
    file.write_at(0, &checksum::seal(metadata, &hasher, |metadata| layout.header(metadata))?)?;
    file.commit()
}

/// Writes the data section from offset `data` on, and returns its hasher.
///
/// Blocks are filled and hashed by the thread pool and written by a thread of their own, so that no thread of the pool
/// waits for the disk.
fn write_data(file: &AtomicFile, data: u64, layout: &FileLayout, fill: &Fill<'_>) -> Result<blake3::Hasher> {
    let mut hasher = blake3::Hasher::new();
    let ((send, filled), (give_back, free)) = (channel::<(u64, Vec<u8>)>(), channel());
    (0..BLOCKS).for_each(|_| drop(give_back.send(Vec::new())));
    thread::scope(|scope| {
        let write = move || -> Result<()> {
            for (offset, block) in filled {
                file.write_at(offset, &block)?;
                // Fails once the last block is filled.
                let _ = give_back.send(block);
            }
            Ok(())
        };
        let thread = thread::Builder::new().name("posthoc-ema-disk".into()).spawn_scoped(scope, write);
        let thread = thread.map_err(Error::io("start the thread that writes", file.path()))?;
        for start in (0..layout.data_len()).step_by(BLOCK) {
            // The thread has ended early; joining it returns the error.
            let Ok(mut block) = free.recv() else { break };
            block.resize(BLOCK.min(layout.data_len() - start), 0);
            rayon::scope(|_| {
                fill_block(&mut block, start, layout.places(), fill);
                hasher.update_rayon(&block);
            });
            let _ = send.send((data + start as u64, block));
        }
        drop(send);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok(hasher)
}

/// Fills a block that begins at offset `start` of the data section, with all threads.
fn fill_block(block: &mut [u8], start: usize, places: &[PlacedTensor], fill: &Fill<'_>) {
    let pieces = block.par_chunks_mut(PIECE).enumerate();
    pieces.for_each(|(i, piece)| fill_piece(piece, start + i * PIECE, places, fill));
}

fn fill_piece(block: &mut [u8], start: usize, places: &[PlacedTensor], fill: &Fill<'_>) {
    let end = start + block.len();
    let first = places.partition_point(|place| place.range.end <= start);
    for PlacedTensor { index, range } in places[first..].iter().take_while(|place| place.range.start < end) {
        let from = range.start.max(start);
        let to = range.end.min(end);
        if from < to {
            fill(*index, from - range.start..to - range.start, &mut block[from - start..to - start]);
        }
    }
}

/// Writes a snapshot into a run, in shards if it is larger than `shard_size`, and returns its files.
///
/// # Errors
/// As [`write_file`]. Shards written before the failure stay, as an incomplete set that is not a snapshot.
pub fn write_snapshot(
    dir: &Path,
    id: SnapshotId,
    specs: Vec<TensorSpec>,
    meta: &Meta,
    shard_size: u64,
    fill: &Fill<'_>,
) -> Result<Vec<PathBuf>> {
    let shards = shards::split(&specs, shard_size)?;
    if let [_] = shards.as_slice() {
        let path = dir.join(id.file_name());
        write_file(&path, specs, meta.to_strings(), fill)?;
        return Ok(vec![path]);
    }
    let mut paths = Vec::with_capacity(shards.len());
    for (i, members) in shards.iter().enumerate() {
        let path = dir.join(id.shard_name(i + 1, shards.len()));
        let own: Vec<TensorSpec> = members.iter().map(|&m| specs[m].clone()).collect();
        let meta = shards::restrict(meta, &own);
        write_file(&path, own, meta.to_strings(), &|i, range, dst| fill(members[i], range, dst))?;
        paths.push(path);
    }
    shards::write_index(dir, id, &specs, &shards)?;
    Ok(paths)
}

/// Writes the file of one process of a sharded training: the parts of tensors that it stores.
///
/// `specs` have the shapes of the parts, and `places` their places in the tensors, in the same order. `metadata` are
/// all strings of the file but those of the places.
///
/// # Errors
/// As [`write_file`].
pub(crate) fn write_part(
    path: &Path,
    specs: Vec<TensorSpec>,
    places: &[PartPlace],
    mut metadata: BTreeMap<String, String>,
    fill: &Fill<'_>,
) -> Result<()> {
    let named = specs.iter().map(|spec| spec.name.as_str()).zip(places);
    metadata.extend(place_strings(named));
    write_file(path, specs, metadata, fill)
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;
    use crate::snapshot::StoredFile;

    /// Covers sizes around multiples of the block, tensors that begin and end within blocks, and no tensor.
    #[test]
    fn any_number_of_blocks_is_written_and_verified() {
        let dir = tempfile::tempdir().unwrap();
        let value = |tensor: usize, i: usize| ((tensor * 31 + i) % 251) as u8;
        for sizes in
            [vec![], vec![0], vec![BLOCK - 1], vec![BLOCK], vec![BLOCK + 1, 5], vec![100, 2 * BLOCK, 3 * BLOCK]]
        {
            let name = |i: usize| format!("{i}");
            let spec = |(i, &size)| TensorSpec { name: name(i), dtype: Dtype::U8, shape: vec![size] };
            let path = dir.path().join("a.safetensors");
            let fill = |tensor: usize, range: Range<usize>, dst: &mut [u8]| {
                dst.iter_mut().zip(range).for_each(|(byte, i)| *byte = value(tensor, i));
            };
            write_file(&path, sizes.iter().enumerate().map(spec).collect(), BTreeMap::new(), &fill).unwrap();
            let file = StoredFile::open(&path).unwrap();
            file.verify().unwrap();
            for (tensor, &size) in sizes.iter().enumerate() {
                let bytes = file.bytes(file.tensors().get(&name(tensor)).unwrap());
                assert!(
                    bytes.len() == size && bytes.iter().enumerate().all(|(i, &b)| b == value(tensor, i)),
                    "{sizes:?}"
                );
            }
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }
}
