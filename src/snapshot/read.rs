//! Reading safetensors files through a mapping.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::layout::MAX_HEADER;
use super::meta::CHECKSUM;
use crate::error::{Error, Result};

/// How a checksum begins: the name of the algorithm.
const ALGORITHM: &str = "blake3:";

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// The element type in the file.
    pub dtype: Dtype,
    /// The shape.
    pub shape: Vec<usize>,
    /// Its bytes within the file.
    range: Range<usize>,
}

/// A safetensors file, mapped, its header checked whole.
#[derive(Debug)]
pub struct StoredFile {
    path: PathBuf,
    map: Mmap,
    data: usize,
    tensors: BTreeMap<String, StoredTensor>,
    metadata: BTreeMap<String, String>,
}

impl StoredFile {
    /// Maps a file and checks its header: sizes, offsets and names all consistent, nothing missing, nothing over.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::Damaged`] where it is no whole safetensors file.
    pub fn open(path: &Path) -> Result<StoredFile> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        if length == 0 {
            return Err(Error::damaged(path, "the file is empty"));
        }
        // SAFETY: the mapping is private and read-only. Files of a run are only ever replaced by renaming, never changed
        // in place, so the bytes do not change under the borrow as long as nobody else writes into the run's files.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let (data, parsed) = read_header(path, &map)?;
        let place = |(start, end): (usize, usize)| data + start..data + end;
        let tensors = parsed.tensors().into_iter().map(|(name, info)| {
            (name, StoredTensor { dtype: info.dtype, shape: info.shape.clone(), range: place(info.data_offsets) })
        });
        let tensors = tensors.collect();
        let metadata = parsed.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(StoredFile { path: path.to_owned(), map, data, tensors, metadata })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// The strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The bytes of a tensor of this file.
    pub fn bytes(&self, tensor: &StoredTensor) -> &[u8] {
        &self.map[tensor.range.clone()]
    }

    /// Has bytes that it lent, all or some of a tensor's, read from the disk in the background; others do not matter.
    pub(crate) fn will_need(&self, bytes: &[u8]) {
        let (start, end) = (bytes.as_ptr().addr(), bytes.as_ptr().addr() + bytes.len());
        let own = self.map.as_ptr().addr();
        if own <= start && end <= own + self.map.len() {
            // A wish: what is not fetched now is when it is read.
            let _ = self.map.advise_range(memmap2::Advice::WillNeed, start - own, bytes.len());
        }
    }

    /// The length of the file in bytes.
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Whether the file has no bytes; it never opens then.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Reads all data and compares their checksum with the one in the metadata.
    ///
    /// # Errors
    /// [`Error::Damaged`] where they differ or where no checksum of a known algorithm is stored.
    pub fn verify(&self) -> Result<()> {
        let stored = self.metadata.get(CHECKSUM).map(String::as_str).unwrap_or_default();
        if !stored.starts_with(ALGORITHM) {
            return Err(Error::damaged(&self.path, format!("no checksum of a known algorithm is stored (`{stored}`)")));
        }
        let found = format_checksum(blake3::Hasher::new().update_rayon(&self.map[self.data..]));
        if found != stored {
            return Err(Error::damaged(&self.path, format!("the data's checksum is {found}, not the stored {stored}")));
        }
        Ok(())
    }
}

/// Where the data begin, and the header. The crate checks every entry; the sum of all lengths is checked here, because
/// its own sum overflows for a hostile header.
fn read_header(path: &Path, bytes: &[u8]) -> Result<(usize, Metadata)> {
    let damaged = |reason: &str| Error::damaged(path, reason);
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| damaged("the file is shorter than 8 bytes"))?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok().filter(|&n| n <= MAX_HEADER);
    let length = length.ok_or_else(|| damaged("the header is longer than the format allows"))?;
    let header = rest.get(..length).ok_or_else(|| damaged("the file ends within its header"))?;
    let parsed: Metadata = serde_json::from_slice(header).map_err(|error| Error::damaged(path, error))?;
    let (told, found) = (parsed.data_len(), rest.len() - length);
    if told != found {
        return Err(damaged(&format!("the header tells of {told} bytes of data, and there are {found}")));
    }
    Ok((8 + length, parsed))
}

/// A checksum as the metadata have it.
pub(super) fn format_checksum(hasher: &blake3::Hasher) -> String {
    format!("{ALGORITHM}{}", hasher.finalize().to_hex())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{TensorSpec, write_file};

    fn sample(dir: &Path) -> PathBuf {
        let path = dir.join("a.safetensors");
        let specs = vec![TensorSpec { name: "w".into(), dtype: Dtype::U8, shape: vec![10_000] }];
        let fill = |_: usize, range: Range<usize>, dst: &mut [u8]| {
            dst.iter_mut().zip(range).for_each(|(d, i)| *d = (i % 249) as u8);
        };
        write_file(&path, specs, BTreeMap::new(), &fill).unwrap();
        path
    }

    #[test]
    fn what_is_written_is_read_and_verified() {
        let dir = tempfile::tempdir().unwrap();
        let file = StoredFile::open(&sample(dir.path())).unwrap();
        let bytes = file.bytes(&file.tensors()["w"]);
        assert!(bytes.iter().enumerate().all(|(i, &b)| b == (i % 249) as u8));
        assert_eq!(bytes.as_ptr().addr() % 4096, 0);
        file.verify().unwrap();
    }

    #[test]
    fn flipped_data_is_found_by_verify() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path());
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let text = StoredFile::open(&path).unwrap().verify().unwrap_err().to_string();
        assert!(text.contains("checksum") && text.contains("a.safetensors"), "{text}");
    }

    #[test]
    fn every_truncation_and_every_broken_header_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path());
        let whole = std::fs::read(&path).unwrap();
        for length in (0..whole.len()).step_by(97) {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(StoredFile::open(&path), Err(Error::Damaged { .. })), "{length}");
        }
        // Lengths that add up to 2^64 - 8.
        let each = (1u64 << 61) - 1;
        let entry = |i: u64| {
            let (start, end) = (i * each, (i + 1) * each);
            format!("\"{i}\":{{\"dtype\":\"U8\",\"shape\":[{each}],\"data_offsets\":[{start},{end}]}}")
        };
        let overflowing = format!("{{{}}}", (0..8).map(entry).collect::<Vec<_>>().join(","));
        let header = |json: &str| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[0; 16]].concat();
        for bytes in [
            u64::MAX.to_le_bytes().to_vec(),
            header("not json"),
            header("{\"w\":{\"dtype\":\"U8\",\"shape\":[99],\"data_offsets\":[0,16]}}"),
            header("{\"w\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[8,16]}}"),
            header("{\"w\":{\"dtype\":\"U8\",\"shape\":[18446744073709551615,9],\"data_offsets\":[0,16]}}"),
            header("{\"w\":{\"dtype\":\"Q8\",\"shape\":[16],\"data_offsets\":[0,16]}}"),
            header("{}"),
            header(&overflowing),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert!(matches!(StoredFile::open(&path), Err(Error::Damaged { .. })));
        }
    }
}
