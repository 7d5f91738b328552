//! Reads of a few scattered elements of a snapshot.

use std::ops::Range;

use safetensors::Dtype;

use super::Snapshot;
use crate::fs::ScatteredFile;

/// Reader of a few scattered elements of a snapshot.
pub(crate) struct ScatteredReader<'s> {
    snapshot: &'s Snapshot,
    /// Each file, opened again; `None` for one that cannot be, whose mapping is read.
    files: Vec<Option<ScatteredFile>>,
    read: Vec<u8>,
    /// Guess of the next tensor's position in the order of names.
    near: usize,
}

impl Snapshot {
    /// Opens the files for reads of a few scattered elements.
    pub(crate) fn scattered(&self) -> ScatteredReader<'_> {
        let files = self.files().iter().map(|file| ScatteredFile::open(file.path(), file.len())).collect();
        ScatteredReader { snapshot: self, files, read: Vec::new(), near: 0 }
    }
}

impl ScatteredReader<'_> {
    /// Calls `act` with the dtype of a tensor and with the bytes of each of some ranges of its elements. Returns `None`
    /// if the snapshot lacks the tensor or a range, or if `act` does.
    pub(crate) fn read(
        &mut self,
        name: &str,
        ranges: impl Iterator<Item = Range<usize>>,
        mut act: impl FnMut(Dtype, &[u8]) -> Option<()>,
    ) -> Option<()> {
        let (index, tensor) = self.snapshot.located(name, &mut self.near)?;
        self.near += 1;
        let file = &self.snapshot.files()[index];
        let size = tensor.dtype.bitsize() / 8;
        let bytes = file.bytes(tensor);
        for elements in ranges {
            let range = elements.start * size..elements.end * size;
            let mapped = bytes.get(range.clone())?;
            self.read.resize(range.len(), 0);
            let start = (file.start(tensor) + range.start) as u64;
            let is_read = self.files[index].as_ref().is_some_and(|file| file.read(&mut self.read, start).is_ok());
            act(tensor.dtype, if is_read { &self.read } else { mapped })?;
        }
        Some(())
    }
}
