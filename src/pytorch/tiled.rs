//! Tensors in rectangles: each in a file of its own or all in one, as they are or with other strides.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use safetensors::Dtype;

use super::tensor::PickledTensor;
use crate::fs::Mapping;
use crate::tensor::ScatteredElements;

/// Tensor in rectangles that tile it, all in mapped files.
#[derive(Clone, Debug)]
pub(super) struct TiledTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Shape in which the parts are rectangles: that of the tensor, or its number of elements if it is cut as a list.
    grid: Vec<usize>,
    /// In order of their first elements, without empty ones.
    parts: Vec<TensorPart>,
    maps: Arc<Vec<Mapping>>,
}

/// Rectangle of a tensor.
#[derive(Clone, Debug)]
pub(super) struct TensorPart {
    /// Index of the file.
    pub file: usize,
    /// Index of its first element along each dimension.
    pub offset: Vec<usize>,
    pub tensor: PickledTensor,
}

impl TensorPart {
    /// Number of dimensions before those along which its elements follow each other in the whole tensor.
    fn row_rank(&self, grid: &[usize]) -> usize {
        let shape = &self.tensor.shape;
        let partial = (0..shape.len()).rev().find(|&i| shape[i] != grid[i]);
        partial.unwrap_or(0)
    }

    /// Number of elements in a row: they follow each other in the whole tensor.
    fn row(&self, grid: &[usize]) -> usize {
        self.tensor.shape[self.row_rank(grid)..].iter().product()
    }

    /// Number of rows.
    fn rows(&self, grid: &[usize]) -> usize {
        self.tensor.shape[..self.row_rank(grid)].iter().product()
    }

    /// Returns the index in the whole tensor of the first element of a row.
    fn row_start(&self, mut row: usize, grid: &[usize]) -> usize {
        let rank = self.row_rank(grid);
        let mut index = 0;
        let mut stride = 1;
        for i in (0..grid.len()).rev() {
            let mut place = self.offset[i];
            if i < rank {
                place += row % self.tensor.shape[i];
                row /= self.tensor.shape[i];
            }
            index += place * stride;
            stride *= grid[i];
        }
        index
    }
}

impl TiledTensor {
    /// Returns a tensor in one piece, in the file of this index.
    pub(super) fn whole(tensor: PickledTensor, file: usize, maps: &Arc<Vec<Mapping>>) -> TiledTensor {
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        let offset = vec![0; shape.len()];
        let parts = vec![TensorPart { file, offset, tensor }];
        TiledTensor { dtype, grid: shape.clone(), shape, parts, maps: maps.clone() }
    }

    /// Puts a tensor together from rectangles of `grid`, which has as many elements as `shape`.
    ///
    /// # Errors
    /// The reason if they do not cover it, each element once, or have different dtypes.
    pub(super) fn new(
        shape: Vec<usize>,
        grid: Vec<usize>,
        mut parts: Vec<TensorPart>,
        maps: &Arc<Vec<Mapping>>,
    ) -> Result<TiledTensor, String> {
        let dtype = parts.first().map(|part| part.tensor.dtype).ok_or("are missing")?;
        if let Some(other) = parts.iter().map(|part| part.tensor.dtype).find(|other| *other != dtype) {
            return Err(format!("have different dtypes ({dtype} and {other}): its files are of different saves"));
        }
        check_tiling(&grid, &parts)?;
        parts.retain(|part| !part.tensor.shape.contains(&0));
        parts.sort_by_cached_key(|part| part.row_start(0, &grid));
        Ok(TiledTensor { dtype, shape, grid, parts, maps: maps.clone() })
    }

    pub(super) fn parts(&self) -> &[TensorPart] {
        &self.parts
    }

    /// Returns the elements in C order, little endian, if a file has them so.
    pub(super) fn stored(&self) -> Option<&[u8]> {
        match self.parts.as_slice() {
            [] => Some(&[]),
            [part] => part.tensor.stored(&self.maps[part.file]),
            _ => None,
        }
    }

    /// Copies all elements in C order, little endian.
    pub(super) fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.copy(&mut bytes, 0);
        bytes
    }

    fn size(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// Calls a function with each stretch of a range of elements that is in one row of a part: the part, the place of
    /// the stretch in the tensor, and its first element in the part. It can end the search.
    fn for_each_stretch<'a>(
        &'a self,
        elements: Range<usize>,
        act: &mut dyn FnMut(&'a TensorPart, Range<usize>, usize) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let until = self.parts.partition_point(|part| part.row_start(0, &self.grid) < elements.end);
        for part in &self.parts[..until] {
            let (length, rows) = (part.row(&self.grid), part.rows(&self.grid));
            let row_end = |row| part.row_start(row, &self.grid) + length;
            for row in first_where(rows, |row| row_end(row) > elements.start)..rows {
                let start = part.row_start(row, &self.grid);
                if start >= elements.end {
                    break;
                }
                let stretch = start.max(elements.start)..(start + length).min(elements.end);
                let first = row * length + stretch.start - start;
                act(part, stretch, first)?;
            }
        }
        ControlFlow::Continue(())
    }
}

impl ScatteredElements for TiledTensor {
    fn len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.size()
    }

    fn piece(&self, bytes: Range<usize>) -> Option<&[u8]> {
        let elements = bytes.start / self.size()..bytes.end / self.size();
        if elements.is_empty() {
            return Some(&[]);
        }
        let mut piece = None;
        let _ = self.for_each_stretch(elements.clone(), &mut |part, stretch, first| {
            if stretch == elements {
                piece = part.tensor.piece(&self.maps[part.file], first..first + stretch.len());
            }
            ControlFlow::Break(())
        });
        piece
    }

    fn copy(&self, dst: &mut [u8], start: usize) {
        let size = self.size();
        let first = start / size;
        let _ = self.for_each_stretch(first..first + dst.len() / size, &mut |part, stretch, from| {
            let place = (stretch.start - first) * size..(stretch.end - first) * size;
            part.tensor.copy(&self.maps[part.file], &mut dst[place], from);
            ControlFlow::Continue(())
        });
    }

    fn will_need(&self, bytes: Range<usize>) {
        let elements = bytes.start / self.size()..bytes.end / self.size();
        // One call for each part: a call for each row would take longer than the reading.
        let mut span: Option<(&TensorPart, Range<usize>)> = None;
        let announce = |span: &Option<(&TensorPart, Range<usize>)>| {
            let Some((part, elements)) = span else { return };
            let map = &self.maps[part.file];
            if let Some(bytes) = part.tensor.piece(map, elements.clone()) {
                map.will_need(bytes);
            }
        };
        let _ = self.for_each_stretch(elements, &mut |part, stretch, first| {
            let end = first + stretch.len();
            match &mut span {
                Some((same, elements)) if std::ptr::eq(*same, part) => elements.end = end,
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

/// Returns the first of some numbers from 0 on that satisfies a condition, as all after it do; `count` if none does.
fn first_where(count: usize, is_met: impl Fn(usize) -> bool) -> usize {
    let mut range = 0..count;
    while !range.is_empty() {
        let middle = range.start + range.len() / 2;
        if is_met(middle) {
            range.end = middle;
        } else {
            range.start = middle + 1;
        }
    }
    range.start
}

/// Checks that rectangles cover a tensor, each element once.
fn check_tiling(shape: &[usize], parts: &[TensorPart]) -> Result<(), String> {
    let volume = |shape: &[usize]| shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
    let whole = volume(shape).ok_or("are too large")?;
    let mut covered = 0usize;
    for part in parts {
        let fits = part.offset.len() == shape.len()
            && part.tensor.shape.len() == shape.len()
            && (0..shape.len())
                .all(|i| part.offset[i].checked_add(part.tensor.shape[i]).is_some_and(|end| end <= shape[i]));
        if !fits {
            return Err(format!("lead out of its shape {shape:?}"));
        }
        covered = covered.saturating_add(volume(&part.tensor.shape).unwrap_or(usize::MAX));
    }
    let overlap = |a: &TensorPart, b: &TensorPart| {
        (0..shape.len())
            .all(|i| a.offset[i] < b.offset[i] + b.tensor.shape[i] && b.offset[i] < a.offset[i] + a.tensor.shape[i])
    };
    let mut sorted: Vec<&TensorPart> = parts.iter().filter(|part| volume(&part.tensor.shape) != Some(0)).collect();
    sorted.sort_by(|a, b| a.offset.cmp(&b.offset));
    for (i, part) in sorted.iter().enumerate() {
        // Sorted by the first dimension, only those that begin before this one ends can overlap it.
        let end = part.offset.first().map_or(usize::MAX, |first| first + part.tensor.shape[0]);
        let near = sorted[i + 1..].iter().take_while(|other| other.offset.first().is_none_or(|first| *first < end));
        if near.clone().any(|other| overlap(part, other)) {
            return Err("overlap".into());
        }
    }
    if covered != whole {
        return Err(format!("hold {covered} of its {whole} elements: the checkpoint is incomplete"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Maps a file of the numbers 0, 1, 2 and so on, of 16 bits each.
    fn numbers(count: u16) -> Arc<Vec<Mapping>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("numbers");
        std::fs::write(&path, (0..count).flat_map(u16::to_le_bytes).collect::<Vec<u8>>()).unwrap();
        Arc::new(vec![crate::pytorch::file::map_file(&path).unwrap()])
    }

    /// Cuts a tensor into rectangles at some places of each dimension. Their elements follow each other in the file.
    fn cut(shape: &[usize], cuts: &[Vec<usize>]) -> Vec<TensorPart> {
        let mut corners = vec![(vec![], vec![])];
        for (extent, cuts) in shape.iter().zip(cuts) {
            let edges: Vec<usize> = [0].into_iter().chain(cuts.iter().copied()).chain([*extent]).collect();
            let extend = |(offset, extents): &(Vec<usize>, Vec<usize>)| {
                let pairs = edges.windows(2).map(|pair| (pair[0], pair[1] - pair[0]));
                let longer = |list: &[usize], item| [list, &[item]].concat();
                pairs.map(|(at, size)| (longer(offset, at), longer(extents, size))).collect::<Vec<_>>()
            };
            corners = corners.iter().flat_map(extend).collect();
        }
        let mut start = 0;
        let mut parts = Vec::new();
        for (offset, extents) in corners {
            let tensor = PickledTensor::plain(Dtype::U16, extents, start).unwrap();
            start += tensor.bytes().unwrap();
            parts.push(TensorPart { file: 0, offset, tensor });
        }
        parts
    }

    /// Returns the numbers of a tensor by a walk over every element of every part.
    fn expected(shape: &[usize], parts: &[TensorPart]) -> Vec<u16> {
        let mut elements = vec![0; shape.iter().product()];
        let mut next = 0;
        for part in parts {
            for mut i in 0..part.tensor.shape.iter().product::<usize>() {
                let mut index = 0;
                let mut stride = 1;
                for d in (0..shape.len()).rev() {
                    index += (part.offset[d] + i % part.tensor.shape[d]) * stride;
                    i /= part.tensor.shape[d];
                    stride *= shape[d];
                }
                elements[index] = next;
                next += 1;
            }
        }
        elements
    }

    #[test]
    fn every_range_of_tiled_tensors_is_read() {
        let maps = numbers(200);
        let cases: &[(&[usize], &[Vec<usize>])] = &[
            (&[], &[]),
            (&[7], &[vec![]]),
            (&[7], &[vec![2, 3]]),
            (&[5, 7], &[vec![2], vec![]]),
            (&[5, 7], &[vec![], vec![3, 5]]),
            (&[4, 3, 5], &[vec![1, 2], vec![], vec![4]]),
            (&[4, 3, 5], &[vec![], vec![1], vec![]]),
            (&[2, 3, 2, 3], &[vec![1], vec![2], vec![1], vec![1]]),
            (&[1, 6, 1], &[vec![], vec![1, 5], vec![]]),
            (&[3, 4], &[vec![1, 1], vec![]]),
            (&[0, 4], &[vec![], vec![]]),
        ];
        for (shape, cuts) in cases {
            let parts = cut(shape, cuts);
            let expected = expected(shape, &parts);
            let bytes: Vec<u8> = expected.iter().flat_map(|number| number.to_le_bytes()).collect();
            let mut parts = parts;
            parts.reverse();
            let tensor = TiledTensor::new(shape.to_vec(), shape.to_vec(), parts, &maps).unwrap();
            assert_eq!(tensor.read(), bytes, "{shape:?} {cuts:?}");
            for start in 0..=expected.len() {
                for end in start..=expected.len() {
                    let range = 2 * start..2 * end;
                    let mut copy = vec![0xee; range.len()];
                    tensor.copy(&mut copy, range.start);
                    assert_eq!(copy, bytes[range.clone()], "{shape:?} {cuts:?} {range:?}");
                    let piece = tensor.piece(range.clone());
                    assert!(piece.is_none_or(|piece| piece == &bytes[range.clone()]), "{shape:?} {cuts:?} {range:?}");
                    tensor.will_need(range);
                }
            }
        }
    }

    #[test]
    fn rows_of_one_part_are_borrowed() {
        let tensor = TiledTensor::new(vec![5, 7], vec![5, 7], cut(&[5, 7], &[vec![2], vec![]]), &numbers(35)).unwrap();
        assert!(tensor.piece(0..28).is_some() && tensor.piece(28..70).is_some());
        assert!(tensor.piece(26..30).is_none() && tensor.stored().is_none());
    }

    #[test]
    fn parts_that_do_not_tile_are_refused() {
        let maps = numbers(200);
        let new = |parts| TiledTensor::new(vec![4, 4], vec![4, 4], parts, &maps).err();
        let parts = || cut(&[4, 4], &[vec![2], vec![1]]);
        assert_eq!(new(parts()), None);
        let mut incomplete = parts();
        incomplete.remove(2);
        assert_eq!(new(incomplete).unwrap(), "hold 14 of its 16 elements: the checkpoint is incomplete");
        let mut twice = parts();
        twice.push(twice[0].clone());
        assert_eq!(new(twice).unwrap(), "overlap");
        let mut outside = parts();
        outside[3].offset[1] = 2;
        assert_eq!(new(outside).unwrap(), "lead out of its shape [4, 4]");
    }
}
