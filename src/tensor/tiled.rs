//! Reads of tensors in rectangles, wherever the parts that hold them are.

use std::fmt::Debug;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::scattered::ScatteredElements;
use super::tiling::{Rows, Stretch, Tiling};

/// Parts of a tensor, each with elements in a C order of its own.
pub(crate) trait TensorParts: Debug + Sync {
    /// Returns elements of a part if they are stored in one piece, as the tensor has them.
    fn piece(&self, part: usize, elements: Range<usize>) -> Option<&[u8]>;

    /// Copies elements of a part from the element `first` on.
    fn copy(&self, part: usize, dst: &mut [u8], first: usize);

    /// Copies elements of a part at equal distances: those of the first row to the start of `dst`. `size` is that of an
    /// element in bytes.
    fn copy_rows(&self, dst: &mut [u8], rows: &Rows, size: usize) {
        copy_each_row(self, dst, rows, size);
    }

    /// Announces that elements of a part will soon be read.
    fn will_need(&self, part: usize, elements: Range<usize>);
}

/// Copies rows one after the other, as [`TensorParts::copy_rows`].
pub(crate) fn copy_each_row(parts: &(impl TensorParts + ?Sized), dst: &mut [u8], rows: &Rows, size: usize) {
    let length = rows.first.elements.len() * size;
    for i in 0..rows.count {
        let start = i * rows.stride * size;
        parts.copy(rows.first.part, &mut dst[start..start + length], rows.first.first + i * rows.part_stride);
    }
}

/// Tensor in rectangles.
#[derive(Clone, Debug)]
pub(crate) struct TiledElements<P> {
    pub tiling: Arc<Tiling>,
    /// Number of elements.
    pub count: usize,
    /// Bytes of an element.
    pub size: usize,
    pub parts: P,
}

impl<P: TensorParts> TiledElements<P> {
    fn elements(&self, bytes: &Range<usize>) -> Range<usize> {
        bytes.start / self.size..bytes.end / self.size
    }
}

impl<P: TensorParts> ScatteredElements for TiledElements<P> {
    fn len(&self) -> usize {
        self.count * self.size
    }

    fn piece(&self, bytes: Range<usize>) -> Option<&[u8]> {
        let elements = self.elements(&bytes);
        if elements.is_empty() {
            return Some(&[]);
        }
        let mut piece = None;
        let _ = self.tiling.for_each_stretch(elements.clone(), &mut |Stretch { part, elements: stretch, first }| {
            if stretch == elements {
                piece = self.parts.piece(part, first..first + stretch.len());
            }
            ControlFlow::Break(())
        });
        piece
    }

    fn copy(&self, dst: &mut [u8], start: usize) {
        let from = start / self.size;
        let elements = from..from + dst.len() / self.size;
        let _ = self.tiling.for_each_rows(elements, &mut |rows| {
            let start = (rows.first.elements.start - from) * self.size;
            self.parts.copy_rows(&mut dst[start..], &rows, self.size);
            ControlFlow::Continue(())
        });
    }

    fn will_need(&self, bytes: Range<usize>) {
        // One call for each part: a call for each row would take longer than the reading.
        let mut span: Option<(usize, Range<usize>)> = None;
        let announce = |span: &Option<(usize, Range<usize>)>| {
            let Some((part, elements)) = span else { return };
            self.parts.will_need(*part, elements.clone());
        };
        let _ = self.tiling.for_each_stretch(self.elements(&bytes), &mut |Stretch { part, elements, first }| {
            let end = first + elements.len();
            match &mut span {
                Some((same, elements)) if *same == part => elements.end = end,
                _ => {
                    announce(&span);
                    span = Some((part, first..end));
                }
            }
            ControlFlow::Continue(())
        });
        announce(&span);
    }
}

/// Range of the elements of a tensor, as a tensor of its own.
#[derive(Debug)]
pub(crate) struct ElementRange<T> {
    pub tensor: T,
    /// In bytes.
    pub range: Range<usize>,
}

impl<T: ScatteredElements> ScatteredElements for ElementRange<T> {
    fn len(&self) -> usize {
        self.range.len()
    }

    fn piece(&self, bytes: Range<usize>) -> Option<&[u8]> {
        self.tensor.piece(self.range.start + bytes.start..self.range.start + bytes.end)
    }

    fn copy(&self, dst: &mut [u8], start: usize) {
        self.tensor.copy(dst, self.range.start + start);
    }

    fn will_need(&self, bytes: Range<usize>) {
        self.tensor.will_need(self.range.start + bytes.start..self.range.start + bytes.end);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tiling::{Tile, TilingFault, volume};
    use super::*;

    /// Lists of 16-bit numbers.
    #[derive(Clone, Debug)]
    struct Lists(Vec<Vec<u8>>);

    impl TensorParts for Lists {
        fn piece(&self, part: usize, elements: Range<usize>) -> Option<&[u8]> {
            self.0[part].get(2 * elements.start..2 * elements.end)
        }

        fn copy(&self, part: usize, dst: &mut [u8], first: usize) {
            dst.copy_from_slice(&self.0[part][2 * first..2 * first + dst.len()]);
        }

        fn will_need(&self, part: usize, elements: Range<usize>) {
            assert!(2 * elements.end <= self.0[part].len());
        }
    }

    /// Offset and shape of each rectangle.
    type Cut = Vec<(Vec<usize>, Vec<usize>)>;

    /// Cuts a tensor at some places of each dimension.
    fn cut(shape: &[usize], cuts: &[&[usize]]) -> Cut {
        let mut corners: Cut = vec![(vec![], vec![])];
        for (extent, cuts) in shape.iter().zip(cuts) {
            let edges: Vec<usize> = [0].into_iter().chain(cuts.iter().copied()).chain([*extent]).collect();
            let extend = |(offset, extents): &(Vec<usize>, Vec<usize>)| {
                let pairs = edges.windows(2).map(|pair| (pair[0], pair[1] - pair[0]));
                pairs.map(|(at, size)| ([&**offset, &[at]].concat(), [&**extents, &[size]].concat())).collect::<Cut>()
            };
            corners = corners.iter().flat_map(extend).collect();
        }
        corners
    }

    /// Returns the indices in a tensor of all elements of a rectangle, by a walk over each.
    fn indices(grid: &[usize], offset: &[usize], shape: &[usize]) -> Vec<usize> {
        let index = |mut i: usize| {
            let (mut index, mut stride) = (0, 1);
            for d in (0..grid.len()).rev() {
                index += (offset[d] + i % shape[d]) * stride;
                i /= shape[d];
                stride *= grid[d];
            }
            index
        };
        (0..volume(shape).unwrap()).map(index).collect()
    }

    fn bytes(numbers: impl IntoIterator<Item = usize>) -> Vec<u8> {
        numbers.into_iter().flat_map(|number| (number as u16).to_le_bytes()).collect()
    }

    /// Makes a tensor whose element `i` is the number `i`.
    fn tiled(grid: &[usize], cut: &Cut) -> TiledElements<Lists> {
        let tile = |(i, (offset, shape)): (usize, &(Vec<usize>, Vec<usize>))| {
            Tile::whole(offset.clone(), shape.clone(), i).unwrap()
        };
        let tiling = Tiling::new(grid.to_vec(), cut.iter().enumerate().map(tile).rev().collect()).unwrap();
        let lists = cut.iter().map(|(offset, shape)| bytes(indices(grid, offset, shape))).collect();
        TiledElements { tiling: Arc::new(tiling), count: volume(grid).unwrap(), size: 2, parts: Lists(lists) }
    }

    /// Compares every range of a tensor with its elements.
    fn check_ranges(tensor: &impl ScatteredElements, expected: &[u8], what: &str) {
        assert_eq!(tensor.len(), expected.len(), "{what}");
        for start in (0..=expected.len()).step_by(2) {
            for end in (start..=expected.len()).step_by(2) {
                let mut copy = vec![0xee; end - start];
                tensor.copy(&mut copy, start);
                assert_eq!(copy, expected[start..end], "{what} {start}..{end}");
                let piece = tensor.piece(start..end);
                assert!(piece.is_none_or(|piece| piece == &expected[start..end]), "{what} {start}..{end}");
                tensor.will_need(start..end);
            }
        }
    }

    /// Tensors with odd dimensions and the places of each dimension at which they are cut.
    const CASES: &[(&[usize], &[&[usize]])] = &[
        (&[], &[]),
        (&[7], &[&[]]),
        (&[7], &[&[2, 3]]),
        (&[5, 7], &[&[2], &[]]),
        (&[5, 7], &[&[], &[3, 5]]),
        (&[5, 7], &[&[1, 4], &[1, 2, 3, 4, 5, 6]]),
        (&[4, 3, 5], &[&[1, 2], &[], &[4]]),
        (&[4, 3, 5], &[&[], &[1], &[]]),
        (&[2, 3, 2, 3], &[&[1], &[2], &[1], &[1]]),
        (&[1, 6, 1], &[&[], &[1, 5], &[]]),
        (&[3, 4], &[&[1, 1], &[]]),
        (&[3, 5], &[&[3, 3, 3], &[]]),
        (&[0, 4], &[&[], &[]]),
    ];

    #[test]
    fn every_range_of_tiled_tensors_is_read() {
        for (shape, cuts) in CASES {
            let tensor = tiled(shape, &cut(shape, cuts));
            check_ranges(&tensor, &bytes(0..volume(shape).unwrap()), &format!("{shape:?} {cuts:?}"));
        }
    }

    #[test]
    fn every_range_of_every_region_is_read() {
        for (shape, cuts) in CASES.iter().filter(|(shape, _)| volume(shape) < Some(40)) {
            let tensor = tiled(shape, &cut(shape, cuts));
            let ends = |extent: &usize| (0..=*extent).flat_map(|end| (0..=end).map(move |start| (start, end)));
            let mut regions: Cut = vec![(vec![], vec![])];
            for extent in *shape {
                let longer = |(offset, extents): &(Vec<usize>, Vec<usize>)| {
                    let ranges = ends(extent).map(|(start, end)| (start, end - start));
                    ranges.map(|(at, size)| ([&**offset, &[at]].concat(), [&**extents, &[size]].concat())).collect()
                };
                regions = regions.iter().flat_map(|region| -> Cut { longer(region) }).collect();
            }
            for (offset, extents) in regions {
                let expected = bytes(indices(shape, &offset, &extents));
                let tiling = Arc::new(tensor.tiling.region(&offset, &extents));
                let region = TiledElements { tiling, count: expected.len() / 2, size: 2, parts: tensor.parts.clone() };
                let mut copy = vec![0xee; expected.len()];
                region.copy(&mut copy, 0);
                assert_eq!(copy, expected, "{shape:?} {cuts:?} {offset:?} {extents:?}");
                if expected.len() < 20 {
                    check_ranges(&region, &expected, &format!("{shape:?} {cuts:?} {offset:?} {extents:?}"));
                }
            }
        }
    }

    #[test]
    fn lists_are_read_as_tensors_and_tensors_as_lists() {
        for shape in [&[] as &[usize], &[7], &[5, 7], &[4, 3, 5], &[2, 3, 2, 3], &[1, 6, 1], &[0, 4]] {
            let count = volume(shape).unwrap();
            for cuts in [vec![], vec![count / 2], vec![count / 3, count / 2, count * 5 / 6], (1..count).collect()] {
                let list = tiled(&[count], &cut(&[count], &[&cuts]));
                let tiling = Arc::new(list.tiling.unflattened(shape));
                assert_eq!(tiling.grid(), shape);
                let tensor = TiledElements { tiling, ..list.clone() };
                check_ranges(&tensor, &bytes(0..count), &format!("{shape:?} {cuts:?}"));
                let range = count / 4..count * 3 / 4;
                let part = ElementRange { tensor, range: 2 * range.start..2 * range.end };
                check_ranges(&part, &bytes(range), &format!("{shape:?} {cuts:?}"));
            }
        }
    }

    #[test]
    fn rows_of_one_part_are_borrowed() {
        let tensor = tiled(&[5, 7], &cut(&[5, 7], &[&[2], &[]]));
        assert!(tensor.piece(0..28).is_some() && tensor.piece(28..70).is_some());
        assert!(tensor.piece(26..30).is_none());
        let columns = tiled(&[5, 7], &cut(&[5, 7], &[&[], &[3]]));
        assert!(columns.piece(0..6).is_some() && columns.piece(6..14).is_some() && columns.piece(0..8).is_none());
        let rows = tensor.tiling.region(&[2, 0], &[3, 7]);
        let mut stretches = Vec::new();
        let all_read = rows.for_each_stretch(0..21, &mut |stretch| {
            stretches.push(stretch);
            ControlFlow::Continue(())
        });
        assert!(all_read.is_continue());
        assert_eq!(stretches, [Stretch { part: 1, elements: 0..21, first: 0 }]);
    }

    #[test]
    fn parts_that_do_not_tile_are_refused() {
        let fault = |cut: &Cut| {
            let tile = |(i, (offset, shape)): (usize, &(Vec<usize>, Vec<usize>))| {
                Tile::whole(offset.clone(), shape.clone(), i).unwrap()
            };
            Tiling::new(vec![4, 4], cut.iter().enumerate().map(tile).collect()).err()
        };
        let parts = cut(&[4, 4], &[&[2], &[1]]);
        assert_eq!(fault(&parts), None);
        let mut incomplete = parts.clone();
        incomplete.remove(2);
        assert_eq!(fault(&incomplete), Some(TilingFault::Hole { covered: 14, whole: 16 }));
        let mut twice = parts.clone();
        twice.push(twice[1].clone());
        assert_eq!(fault(&twice), Some(TilingFault::Overlap(1, 4)));
        let mut shifted = parts.clone();
        shifted[0].1[0] = 3;
        shifted[1].1[0] = 1;
        assert_eq!(fault(&shifted), Some(TilingFault::Overlap(0, 2)));
        let mut outside = parts.clone();
        outside[3].0[1] = 2;
        assert_eq!(fault(&outside), Some(TilingFault::Outside(3)));
        let mut far = parts;
        far[3].0[1] = usize::MAX;
        assert_eq!(fault(&far), Some(TilingFault::Outside(3)));
    }
}
