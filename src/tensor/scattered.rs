//! Tensors whose elements are not in one piece of memory.

use std::fmt::Debug;
use std::ops::Range;

#[cfg(feature = "pytorch")]
use super::{Dtype, finite::first_non_finite};

/// Elements of a tensor, in C order and little endian, that are read in ranges. Ranges are in bytes, and of whole
/// elements.
pub trait ScatteredElements: Debug + Sync {
    /// Returns the number of bytes.
    fn len(&self) -> usize;

    /// Returns true if the number of bytes is 0.
    #[cfg(feature = "cuda")]
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns a range that is stored in one piece.
    fn piece(&self, bytes: Range<usize>) -> Option<&[u8]>;

    /// Copies the bytes from `start` on.
    fn copy(&self, dst: &mut [u8], start: usize);

    /// Announces that a range will soon be read.
    fn will_need(&self, bytes: Range<usize>);
}

/// Bytes of the elements that are looked at in one piece, a multiple of every element's size.
const PIECE: usize = 1 << 18;

impl ScatteredElements for &[u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn piece(&self, bytes: Range<usize>) -> Option<&[u8]> {
        self.get(bytes)
    }

    fn copy(&self, dst: &mut [u8], start: usize) {
        dst.copy_from_slice(&self[start..start + dst.len()]);
    }

    fn will_need(&self, _bytes: Range<usize>) {}
}

/// Returns true if two tensors have the same bytes.
pub(crate) fn equal_elements(a: &dyn ScatteredElements, b: &dyn ScatteredElements) -> bool {
    let mut copies = [Vec::new(), Vec::new()];
    a.len() == b.len()
        && pieces(a.len()).all(|range| {
            let [copy, other] = &mut copies;
            read(a, range.clone(), copy) == read(b, range, other)
        })
}

/// Returns the index and the value of the first element that is NaN or infinite.
#[cfg(feature = "pytorch")]
pub(crate) fn first_non_finite_in(dtype: Dtype, elements: &dyn ScatteredElements) -> Option<(usize, f64)> {
    let mut copy = Vec::new();
    pieces(elements.len()).find_map(|range| {
        let before = range.start / (dtype.bitsize() / 8).max(1);
        let (element, value) = first_non_finite(dtype, read(elements, range, &mut copy))?;
        Some((before + element, value))
    })
}

/// Calls a function with all bytes, piece by piece.
#[cfg(feature = "pytorch")]
pub(crate) fn for_each_piece(elements: &dyn ScatteredElements, act: &mut dyn FnMut(&[u8])) {
    let mut copy = Vec::new();
    pieces(elements.len()).for_each(|range| act(read(elements, range, &mut copy)));
}

/// Iterates over the ranges of some bytes that are looked at in one piece.
fn pieces(bytes: usize) -> impl Iterator<Item = Range<usize>> {
    (0..bytes).step_by(PIECE).map(move |start| start..bytes.min(start + PIECE))
}

/// Returns a range of the elements, copied if it is not in one piece.
fn read<'a>(elements: &'a dyn ScatteredElements, range: Range<usize>, copy: &'a mut Vec<u8>) -> &'a [u8] {
    match elements.piece(range.clone()) {
        Some(piece) => piece,
        None => {
            copy.resize(range.len(), 0);
            elements.copy(copy, range.start);
            copy
        }
    }
}
