//! Reading safetensors files through a mapping.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::checksum;
use super::header::{Header, SiblingHeader};
use super::layout::MAX_HEADER;
use super::tensors::{StoredTensor, StoredTensors};
use crate::error::{Error, Result};
use crate::fs::{Mapping, check_regular, open_regular, read_start, start_threads};

/// Bytes that are read first of a file that is not mapped: they hold most headers.
const FIRST_READ: u64 = 16 << 10;

/// Safetensors file whose header is checked. It is mapped, unless it is one of the many files of a large sharded run:
/// such a file is mapped when its tensors are first read.
#[derive(Debug)]
pub struct StoredFile {
    path: PathBuf,
    /// Length of the file in bytes.
    length: u64,
    map: OnceLock<Mapping>,
    /// Offset of the data section.
    data: usize,
    header: Header,
    /// Text of the header of a file that was opened unmapped, if no sibling has the same.
    text: Vec<u8>,
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
        let length = map.len() as u64;
        let (json, start) = split_header(path, &map, length)?;
        let header = Header::read(path, json, map.len() - start, sibling.and_then(StoredFile::known_header))?;
        Ok(StoredFile { path: path.to_owned(), length, map: map.into(), data: start, header, text: Vec::new() })
    }

    /// As [`StoredFile::open_like`] with the check of [`StoredFile::check_header`], but does not map the file.
    pub(super) fn open_unmapped(path: &Path, sibling: Option<&StoredFile>) -> Result<StoredFile> {
        let (file, length) = open_regular(path)?;
        let mut bytes = Vec::new();
        read_start(&file, &mut bytes, FIRST_READ.min(length)).map_err(Error::io("read", path))?;
        let header = bytes.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length)).saturating_add(8);
        if header > bytes.len() as u64 && header <= length.min(8 + MAX_HEADER as u64) {
            read_start(&file, &mut bytes, header).map_err(Error::io("read", path))?;
        }
        let (json, start) = split_header(path, &bytes, length)?;
        let data = usize::try_from(length).map_err(|error| Error::damaged(path, error))? - start;
        let header = Header::read(path, json, data, sibling.and_then(StoredFile::known_header))?;
        checksum::check_header(&bytes[..start], &header.metadata).map_err(|reason| Error::damaged(path, reason))?;
        let is_known = sibling.is_some_and(|sibling| Arc::ptr_eq(&sibling.header.tensors, &header.tensors));
        let text = if is_known { Vec::new() } else { json.to_vec() };
        Ok(StoredFile { path: path.to_owned(), length, map: OnceLock::new(), data: start, header, text })
    }

    /// Returns the header for comparisons with others, if its text is at hand.
    fn known_header(&self) -> Option<SiblingHeader<'_>> {
        let rest = self.header.rest.clone()?;
        let text = match self.map.get() {
            Some(map) if self.text.is_empty() => &map[8..],
            _ => &self.text,
        };
        Some(SiblingHeader { tensors: &self.header.tensors, rest: text.get(rest)? })
    }

    /// Maps the file, if it is not mapped yet.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Damaged`] if its length has changed.
    pub(super) fn mapped(&self) -> Result<&Mapping> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let map = self.map_again()?;
        Ok(self.map.get_or_init(|| map))
    }

    fn map_again(&self) -> Result<Mapping> {
        let (file, length) = open_regular(&self.path)?;
        if length != self.length {
            let why = format!("it had {} bytes when it was opened, and now has {length}", self.length);
            return Err(Error::damaged(&self.path, why));
        }
        Mapping::new(&file, &self.path).map_err(Error::io("map", &self.path))
    }

    /// Drops the strings of `__metadata__` but the checksums. Thousands of files of a run would hold the same ones.
    pub(super) fn forget_metadata(&mut self) {
        self.header.metadata.retain(|key, _| checksum::is_key(key));
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
    ///
    /// # Panics
    /// If the file was not mapped yet, and the system cannot map it.
    pub fn bytes(&self, tensor: &StoredTensor) -> &[u8] {
        let map = self.mapped().unwrap_or_else(|error| panic!("{error}"));
        &map[self.data + tensor.range.start..self.data + tensor.range.end]
    }

    /// Returns the byte of the file at which a tensor of this file begins.
    pub(crate) fn start(&self, tensor: &StoredTensor) -> usize {
        self.data + tensor.range.start
    }

    /// Returns the mapping of the whole file.
    #[cfg(feature = "pytorch")]
    pub(crate) fn into_mapping(self) -> Mapping {
        self.map.into_inner().expect("a file that was opened alone is mapped")
    }

    /// Starts to read bytes of a tensor from the disk in the background. Bytes outside the mapping are ignored.
    pub(crate) fn will_need(&self, bytes: &[u8]) {
        self.map.get().into_iter().for_each(|map| map.will_need(bytes));
    }

    /// Unmaps all pages. Later reads map them again.
    pub(super) fn unmap_pages(&self) {
        self.map.get().into_iter().for_each(Mapping::unmap_pages);
    }

    /// Returns the length of the file in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Returns true if the file has no bytes; such a file never opens.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Compares the header with its checksum in the metadata, if it has one.
    ///
    /// [`StoredFile::open`] does not: a file that another program changed and saved with these metadata is whole.
    ///
    /// # Errors
    /// [`Error::Damaged`] if they differ.
    pub(crate) fn check_header(&self) -> Result<()> {
        self.check_bytes(|map| checksum::check_header(&map[..self.data], &self.header.metadata))
    }

    /// Compares the checksums of all data and of the header with those in the metadata.
    ///
    /// # Errors
    /// [`Error::Damaged`] if they differ, or if the metadata have no checksum of a known algorithm; [`Error::Threads`].
    pub fn verify(&self) -> Result<()> {
        start_threads()?;
        self.check_bytes(|map| {
            checksum::check_header(&map[..self.data], &self.header.metadata)?;
            checksum::check_data(&map[self.data..], &self.header.metadata)
        })
    }

    /// Checks the bytes of the file, which are mapped for that time only if they are not.
    fn check_bytes(&self, check: impl FnOnce(&[u8]) -> Result<(), String>) -> Result<()> {
        let checked = match self.map.get() {
            Some(map) => check(map),
            None => check(&self.map_again()?),
        };
        checked.map_err(|reason| Error::damaged(&self.path, reason))
    }
}

/// Finds the text of the header in the first bytes of a file of `length` bytes. Returns it, and where the data begin.
fn split_header<'a>(path: &Path, bytes: &'a [u8], length: u64) -> Result<(&'a [u8], usize)> {
    let damaged = |reason: &str| Error::damaged(path, reason);
    if length == 0 {
        return Err(damaged("the file is empty"));
    }
    let (header, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| damaged("the file is shorter than 8 bytes"))?;
    let header = usize::try_from(u64::from_le_bytes(*header)).ok().filter(|&n| n <= MAX_HEADER);
    let header = header.ok_or_else(|| damaged("the header is longer than the format allows"))?;
    let json = rest.get(..header).ok_or_else(|| damaged("the file ends within its header"))?;
    Ok((json, 8 + header))
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
