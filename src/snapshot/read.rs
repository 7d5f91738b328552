//! Reading safetensors files through a mapping.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::checksum;
use super::header::{Header, SiblingHeader};
use super::layout::MAX_HEADER;
use super::tensors::{StoredTensor, StoredTensors};
use crate::error::{Error, Result};
use crate::fs::{Mapping, check_regular, start_threads};

/// Safetensors file that is mapped and whose header is checked.
#[derive(Debug)]
pub struct StoredFile {
    path: PathBuf,
    map: Mapping,
    /// Offset of the data section.
    data: usize,
    header: Header,
}

impl StoredFile {
    /// Maps a file and checks its header: sizes, offsets and names are consistent and cover the whole file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Damaged`] if it is not a whole safetensors file.
    pub fn open(path: &Path) -> Result<StoredFile> {
        StoredFile::open_like(path, None)
    }

    /// As [`StoredFile::open`], and faster if a sibling's header lists the same tensors.
    pub(super) fn open_like(path: &Path, sibling: Option<&StoredFile>) -> Result<StoredFile> {
        if check_regular(path)?.len() == 0 {
            return Err(Error::damaged(path, "the file is empty"));
        }
        let file = File::open(path).map_err(Error::io("read", path))?;
        let map = Mapping::new(&file, path).map_err(Error::io("map", path))?;
        let (json, data) = split_header(path, &map)?;
        let known = sibling.and_then(|sibling| {
            let rest = sibling.header.rest.clone()?;
            Some(SiblingHeader { tensors: &sibling.header.tensors, rest: &sibling.map[8 + rest.start..8 + rest.end] })
        });
        let header = Header::read(path, json, data.len(), known)?;
        let data = map.len() - data.len();
        Ok(StoredFile { path: path.to_owned(), map, data, header })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns all tensors, by name.
    pub fn tensors(&self) -> &StoredTensors {
        &self.header.tensors
    }

    /// Returns true if the other file is known to have the same tensors in the same places.
    pub(super) fn shares_tensors(&self, other: &StoredFile) -> bool {
        Arc::ptr_eq(&self.header.tensors, &other.header.tensors)
    }

    /// Returns the strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Returns the bytes of a tensor of this file.
    pub fn bytes(&self, tensor: &StoredTensor) -> &[u8] {
        &self.map[self.data + tensor.range.start..self.data + tensor.range.end]
    }

    /// Returns the byte of the file at which a tensor of this file begins.
    pub(crate) fn start(&self, tensor: &StoredTensor) -> usize {
        self.data + tensor.range.start
    }

    /// Returns the mapping of the whole file.
    #[cfg(feature = "pytorch")]
    pub(crate) fn into_mapping(self) -> Mapping {
        self.map
    }

    /// Starts to read bytes of a tensor from the disk in the background. Bytes outside the mapping are ignored.
    pub(crate) fn will_need(&self, bytes: &[u8]) {
        self.map.will_need(bytes);
    }

    /// Unmaps all pages. Later reads map them again.
    pub(super) fn unmap_pages(&self) {
        self.map.unmap_pages();
    }

    /// Returns the length of the file in bytes.
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Returns true if the file has no bytes; such a file never opens.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Compares the header with its checksum in the metadata, if it has one.
    ///
    /// [`StoredFile::open`] does not: a file that another program changed and saved with these metadata is whole.
    ///
    /// # Errors
    /// [`Error::Damaged`] if they differ.
    pub(crate) fn check_header(&self) -> Result<()> {
        checksum::check_header(&self.map[..self.data], &self.header.metadata)
            .map_err(|reason| Error::damaged(&self.path, reason))
    }

    /// Compares the checksums of all data and of the header with those in the metadata.
    ///
    /// # Errors
    /// [`Error::Damaged`] if they differ, or if the metadata have no checksum of a known algorithm; [`Error::Threads`].
    pub fn verify(&self) -> Result<()> {
        self.check_header()?;
        start_threads()?;
        checksum::check_data(&self.map[self.data..], &self.header.metadata)
            .map_err(|reason| Error::damaged(&self.path, reason))
    }
}

/// Splits a file into the text of its header and the data section.
fn split_header<'a>(path: &Path, bytes: &'a [u8]) -> Result<(&'a [u8], &'a [u8])> {
    let damaged = |reason: &str| Error::damaged(path, reason);
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| damaged("the file is shorter than 8 bytes"))?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok().filter(|&n| n <= MAX_HEADER);
    let length = length.ok_or_else(|| damaged("the header is longer than the format allows"))?;
    rest.split_at_checked(length).ok_or_else(|| damaged("the file ends within its header"))
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use safetensors::Dtype;

    use super::*;
    use crate::snapshot::write_file;
    use crate::tensor::TensorSpec;

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
    fn written_file_is_read_and_verified() {
        let dir = tempfile::tempdir().unwrap();
        let file = StoredFile::open(&sample(dir.path())).unwrap();
        let bytes = file.bytes(file.tensors().get("w").unwrap());
        assert!(bytes.iter().enumerate().all(|(i, &b)| b == (i % 249) as u8));
        assert_eq!(bytes.as_ptr().addr() % 4096, 0);
        file.verify().unwrap();
    }

    #[test]
    fn verify_finds_flipped_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path());
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let text = StoredFile::open(&path).unwrap().verify().unwrap_err().to_string();
        assert!(text.contains("checksum") && text.contains("a.safetensors"), "{text}");
    }

    #[test]
    fn truncated_files_and_broken_headers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path());
        let whole = std::fs::read(&path).unwrap();
        for length in (0..whole.len()).step_by(97) {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(StoredFile::open(&path), Err(Error::Damaged { .. })), "{length}");
        }
        // The lengths add up to 2^64 - 8.
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
