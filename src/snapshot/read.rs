//! Reading safetensors files through a mapping.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Advice;

use super::checksum;
use super::header::{Header, Known};
use super::layout::MAX_HEADER;
use super::tensors::{StoredTensor, StoredTensors};
use crate::error::{Error, Result};
use crate::fs::Mapping;
use crate::fs::check_regular;

/// A safetensors file, mapped, its header checked whole.
#[derive(Debug)]
pub struct StoredFile {
    path: PathBuf,
    map: Mapping,
    /// Where the data section begins.
    data: usize,
    header: Header,
}

impl StoredFile {
    /// Maps a file and checks its header: sizes, offsets and names all consistent, nothing missing, nothing over.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::Damaged`] where it is no whole safetensors file.
    pub fn open(path: &Path) -> Result<StoredFile> {
        StoredFile::open_like(path, None)
    }

    /// As [`StoredFile::open`], sooner where a sibling's header says the same of its tensors.
    pub(super) fn open_like(path: &Path, sibling: Option<&StoredFile>) -> Result<StoredFile> {
        if check_regular(path)?.len() == 0 {
            return Err(Error::damaged(path, "the file is empty"));
        }
        let file = File::open(path).map_err(Error::io("read", path))?;
        let map = Mapping::new(&file, path).map_err(Error::io("map", path))?;
        let (json, data) = split_header(path, &map)?;
        let known = sibling.and_then(|sibling| {
            let rest = sibling.header.rest.clone()?;
            Some(Known { tensors: &sibling.header.tensors, rest: &sibling.map[8 + rest.start..8 + rest.end] })
        });
        let header = Header::read(path, json, data.len(), known)?;
        let data = map.len() - data.len();
        Ok(StoredFile { path: path.to_owned(), map, data, header })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> &StoredTensors {
        &self.header.tensors
    }

    /// Whether the other file's tensors are known to be the same, in the same places.
    pub(super) fn shares_tensors(&self, other: &StoredFile) -> bool {
        Arc::ptr_eq(&self.header.tensors, &other.header.tensors)
    }

    /// The strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The bytes of a tensor of this file.
    pub fn bytes(&self, tensor: &StoredTensor) -> &[u8] {
        &self.map[self.data + tensor.range.start..self.data + tensor.range.end]
    }

    /// Has bytes that it lent, all or some of a tensor's, read from the disk in the background; others do not matter.
    pub(crate) fn will_need(&self, bytes: &[u8]) {
        self.map.will_need(bytes);
    }

    /// Tells the system whether few bytes here and there are going to be read, so that it fetches no others with them.
    pub(super) fn read_sparsely(&self, sparsely: bool) {
        self.map.advise(if sparsely { Advice::Random } else { Advice::Normal });
    }

    /// Unmaps all pages; whoever reads on has them mapped anew.
    pub(super) fn unmap_pages(&self) {
        self.map.unmap_pages();
    }

    /// The length of the file in bytes.
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Whether the file has no bytes; it never opens then.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Compares the header with its checksum in the metadata, where there is one.
    ///
    /// Left out by [`StoredFile::open`]: a file that another program has changed and saved with our metadata is whole.
    ///
    /// # Errors
    /// [`Error::Damaged`] where they differ.
    pub(crate) fn check_header(&self) -> Result<()> {
        checksum::check_header(&self.map[..self.data], &self.header.metadata)
            .map_err(|reason| Error::damaged(&self.path, reason))
    }

    /// Reads all data and compares their checksum, and that of the header, with those in the metadata.
    ///
    /// # Errors
    /// [`Error::Damaged`] where they differ or where no checksum of a known algorithm is stored.
    pub fn verify(&self) -> Result<()> {
        self.check_header()?;
        checksum::check_data(&self.map[self.data..], &self.header.metadata)
            .map_err(|reason| Error::damaged(&self.path, reason))
    }
}

/// The text of the header, and the data section.
fn split_header<'a>(path: &Path, bytes: &'a [u8]) -> Result<(&'a [u8], &'a [u8])> {
    let damaged = |reason: &str| Error::damaged(path, reason);
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| damaged("the file is shorter than 8 bytes"))?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok().filter(|&n| n <= MAX_HEADER);
    let length = length.ok_or_else(|| damaged("the header is longer than the format allows"))?;
    rest.split_at_checked(length).ok_or_else(|| damaged("the file ends within its header"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::TensorSpec;

    use crate::snapshot::write_file;
    use safetensors::Dtype;
    use std::ops::Range;

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
        let bytes = file.bytes(file.tensors().get("w").unwrap());
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
