//! Reads of a few scattered elements of a snapshot.

use std::ops::{ControlFlow, Range};

use safetensors::Dtype;

use super::Snapshot;
use super::global_tensor::{GlobalTensor, PartLocation};
use super::tensor_set::widen;
use crate::fs::ScatteredFile;
use crate::tensor::Stretch;

/// Reader of a few scattered elements of a snapshot.
pub(crate) struct ScatteredReader<'s> {
    snapshot: &'s Snapshot,
    file: LastFile,
    read: Vec<u8>,
    /// Elements of a part that has another dtype than the whole tensor.
    narrow: Vec<u8>,
    /// Guess of the next tensor's position in the order of names.
    near: usize,
}

/// File that was read last. A snapshot of a sharded training may have more files than a process may open at a time.
///
/// `None` for a file that cannot be opened again, whose mapping is read.
#[derive(Default)]
struct LastFile(Option<(usize, Option<ScatteredFile>)>);

impl Snapshot {
    /// Returns a reader of a few scattered elements.
    pub(crate) fn scattered(&self) -> ScatteredReader<'_> {
        ScatteredReader { snapshot: self, file: LastFile::default(), read: Vec::new(), narrow: Vec::new(), near: 0 }
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
        let tensor = self.snapshot.located(name, &mut self.near)?;
        self.near += 1;
        let count = tensor.count()?;
        for elements in ranges {
            if elements.end > count {
                return None;
            }
            self.read_range(tensor, elements)?;
            act(tensor.stored.dtype, &self.read)?;
        }
        Some(())
    }

    /// Reads a range in the order of its elements, whatever the order of the parts.
    fn read_range(&mut self, tensor: &GlobalTensor, elements: Range<usize>) -> Option<()> {
        let ScatteredReader { snapshot, file, read, narrow, .. } = self;
        let dtype = tensor.stored.dtype;
        let size = dtype.bitsize() / 8;
        read.resize(elements.len() * size, 0);
        let all_read = tensor.tiling.for_each_stretch(elements.clone(), &mut |stretch: Stretch| {
            let location = tensor.parts[stretch.part];
            let own = snapshot.files()[location.file].tensors().at(location.tensor).1.dtype;
            let place =
                (stretch.elements.start - elements.start) * size..(stretch.elements.end - elements.start) * size;
            let dst = &mut read[place];
            let is_read = if own == dtype {
                file.read(snapshot, location, dst, stretch.first * size)
            } else {
                narrow.resize(stretch.elements.len() * own.bitsize() / 8, 0);
                let is_read = file.read(snapshot, location, narrow, stretch.first * own.bitsize() / 8);
                widen(dst, narrow, own);
                is_read
            };
            is_read.map_or(ControlFlow::Break(()), ControlFlow::Continue)
        });
        all_read.is_continue().then_some(())
    }
}

impl LastFile {
    /// Reads bytes of a part from the byte `from` on. Returns `None` if the file cannot be read.
    fn read(&mut self, snapshot: &Snapshot, location: PartLocation, dst: &mut [u8], from: usize) -> Option<()> {
        let file = &snapshot.files()[location.file];
        let stored = file.tensors().at(location.tensor).1;
        if self.0.as_ref().is_none_or(|(other, _)| *other != location.file) {
            self.0 = Some((location.file, ScatteredFile::open(file.path(), file.len())));
        }
        let opened = self.0.as_ref().and_then(|(_, opened)| opened.as_ref());
        if opened.is_some_and(|opened| opened.read(dst, (file.start(stored) + from) as u64).is_ok()) {
            return Some(());
        }
        file.mapped().ok()?;
        dst.copy_from_slice(file.bytes(stored).get(from..from + dst.len())?);
        Some(())
    }
}
