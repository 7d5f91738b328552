//! Tensors whose elements are not in one piece of memory.

use std::fmt::Debug;
use std::ops::Range;

/// Elements of a tensor, in C order and little endian, that are read in ranges. Ranges are in bytes, and of whole
/// elements.
pub trait ScatteredElements: Debug + Sync {
    /// Returns the number of bytes.
    fn len(&self) -> usize;

    /// Returns a range that is stored in one piece.
    fn piece(&self, bytes: Range<usize>) -> Option<&[u8]>;

    /// Copies the bytes from `start` on.
    fn copy(&self, dst: &mut [u8], start: usize);

    /// Announces that a range will soon be read.
    fn will_need(&self, bytes: Range<usize>);
}
