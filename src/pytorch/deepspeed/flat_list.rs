//! Lists of elements that several tensors hold one after the other.

use std::ops::Range;

use crate::pytorch::tensor::PickledTensor;
use crate::pytorch::tiled::TensorPart;

/// Tensors of one dimension that follow each other, each with the index of its file.
#[derive(Debug, Default)]
pub(super) struct FlatList {
    pieces: Vec<(usize, PickledTensor)>,
    /// Number of elements up to the end of each piece.
    ends: Vec<usize>,
}

impl FlatList {
    /// Adds a tensor. Returns `None` if it is not a list of elements that follow each other in its file.
    pub(super) fn push(&mut self, file: usize, tensor: PickledTensor) -> Option<()> {
        let length = *tensor.shape.first()?;
        tensor.stretch(0..length)?;
        self.ends.push(self.len().checked_add(length)?);
        self.pieces.push((file, tensor));
        Some(())
    }

    /// Returns the number of elements.
    pub(super) fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Cuts out some elements, which begin at the element `at` of a tensor. Returns `None` if they lead out of the
    /// list.
    pub(super) fn cut(&self, elements: Range<usize>, at: usize) -> Option<Vec<TensorPart>> {
        if elements.end > self.len() {
            return None;
        }
        let mut parts = Vec::new();
        let first = self.ends.partition_point(|&end| end <= elements.start).min(self.pieces.len().checked_sub(1)?);
        for (i, (file, piece)) in self.pieces.iter().enumerate().skip(first) {
            let start = self.ends[i] - piece.shape[0];
            if start >= elements.end && i > first {
                break;
            }
            let stretch = elements.start.max(start)..elements.end.min(self.ends[i]);
            let offset = vec![at + stretch.start - elements.start];
            let tensor = piece.stretch(stretch.start - start..stretch.end - start)?;
            parts.push(TensorPart { file: *file, offset, tensor });
        }
        Some(parts)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;

    /// Every range of lists of every cut, compared with the bytes at which its elements are.
    #[test]
    fn ranges_are_cut_out_of_the_pieces() {
        for lengths in [&[5][..], &[3, 4], &[0, 2, 0, 5], &[1, 1, 1, 4, 0]] {
            let mut list = FlatList::default();
            let mut bytes = Vec::new();
            for (file, &length) in lengths.iter().enumerate() {
                list.push(file, PickledTensor::plain(Dtype::F32, vec![length], 100 * file).unwrap()).unwrap();
                bytes.extend((0..length).map(|i| (file, 100 * file + 4 * i)));
            }
            assert_eq!(list.len(), bytes.len());
            for start in 0..=bytes.len() {
                for end in start..=bytes.len() {
                    let mut found = Vec::new();
                    let parts = list.cut(start..end, 7).unwrap();
                    for part in &parts {
                        assert_eq!(part.offset, [7 + found.len()]);
                        let first = part.tensor.place().0;
                        found.extend((0..part.tensor.shape[0]).map(|i| (part.file, first + 4 * i)));
                    }
                    assert_eq!(found, bytes[start..end], "{lengths:?} {start} {end}");
                    assert!(!parts.is_empty());
                }
                assert!(list.cut(start..bytes.len() + 1, 0).is_none());
            }
        }
        assert!(FlatList::default().cut(0..0, 0).is_none());
    }

    #[test]
    fn other_tensors_than_lists_are_refused() {
        let mut list = FlatList::default();
        assert!(list.push(0, PickledTensor::plain(Dtype::F32, vec![], 0).unwrap()).is_none());
        assert!(list.push(0, PickledTensor::plain(Dtype::F32, vec![2, 2], 0).unwrap()).is_none());
    }
}
