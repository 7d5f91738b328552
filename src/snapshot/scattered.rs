//! Reads of a few scattered elements of a snapshot.

use std::ops::{ControlFlow, Range};

use safetensors::Dtype;

use super::Snapshot;
use super::global_tensor::{GlobalTensor, PartLocation};
use crate::fs::ScatteredFile;
use crate::tensor::Stretch;

/// Reader of a few scattered elements of a snapshot.
pub(crate) struct ScatteredReader<'s> {
    snapshot: &'s Snapshot,
    /// Index of the file that was read last, and the file opened again; `None` if it cannot be, and is mapped instead.
    ///
    /// A snapshot of a sharded training may have more files than a process may open at a time.
    opened: Option<(usize, Option<ScatteredFile>)>,
    read: Vec<u8>,
    /// Guess of the next tensor's position in the order of names.
    near: usize,
}

impl Snapshot {
    /// Returns a reader of a few scattered elements.
    pub(crate) fn scattered(&self) -> ScatteredReader<'_> {
        ScatteredReader { snapshot: self, opened: None, read: Vec::new(), near: 0 }
    }
}

impl ScatteredReader<'_> {
    /// Calls `act` with the dtype of a tensor and with the bytes of pieces of some ranges of its elements, in their
    /// order. Returns `None` if the snapshot lacks the tensor or a range, or if `act` does.
    pub(crate) fn read(
        &mut self,
        name: &str,
        ranges: impl Iterator<Item = Range<usize>>,
        mut act: impl FnMut(Dtype, &[u8]) -> Option<()>,
    ) -> Option<()> {
        let tensor = self.snapshot.located(name, &mut self.near)?;
        self.near += 1;
        for elements in ranges {
            if elements.end > tensor.count()? {
                return None;
            }
            let each = &mut |stretch| match self.read_stretch(tensor, &stretch, &mut act) {
                Some(()) => ControlFlow::Continue(()),
                None => ControlFlow::Break(()),
            };
            if tensor.tiling.for_each_stretch(elements, each).is_break() {
                return None;
            }
        }
        Some(())
    }

    fn read_stretch(
        &mut self,
        tensor: &GlobalTensor,
        stretch: &Stretch,
        act: &mut impl FnMut(Dtype, &[u8]) -> Option<()>,
    ) -> Option<()> {
        let PartLocation { file: index, tensor } = tensor.parts[stretch.part];
        let file = &self.snapshot.files()[index];
        let stored = file.tensors().at(tensor).1;
        let size = stored.dtype.bitsize() / 8;
        let range = stretch.first * size..(stretch.first + stretch.elements.len()) * size;
        if self.opened.as_ref().is_none_or(|(other, _)| *other != index) {
            self.opened = Some((index, ScatteredFile::open(file.path(), file.len())));
        }
        self.read.resize(range.len(), 0);
        let start = (file.start(stored) + range.start) as u64;
        let opened = self.opened.as_ref().and_then(|(_, opened)| opened.as_ref());
        if opened.is_some_and(|file| file.read(&mut self.read, start).is_ok()) {
            return act(stored.dtype, &self.read);
        }
        file.mapped().ok()?;
        act(stored.dtype, file.bytes(stored).get(range)?)
    }
}
