//! Tensors in rectangles: each in a file of its own or all in one, as they are or with other strides.

use std::ops::Range;
use std::sync::Arc;

use safetensors::Dtype;

use super::tensor::PickledTensor;
use crate::fs::Mapping;
use crate::tensor::{ScatteredElements, TensorParts, Tile, TiledElements, Tiling, TilingFault, volume};

/// Tensor in rectangles that tile it, all in mapped files.
#[derive(Clone, Debug)]
pub(super) struct TiledTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    elements: TiledElements<MappedParts>,
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

/// Rectangles in mapped files.
#[derive(Clone, Debug)]
struct MappedParts {
    parts: Vec<TensorPart>,
    maps: Arc<Vec<Mapping>>,
}

impl TensorParts for MappedParts {
    fn piece(&self, part: usize, elements: Range<usize>) -> Option<&[u8]> {
        let part = &self.parts[part];
        part.tensor.piece(&self.maps[part.file], elements)
    }

    fn copy(&self, part: usize, dst: &mut [u8], first: usize) {
        let part = &self.parts[part];
        part.tensor.copy(&self.maps[part.file], dst, first);
    }

    fn will_need(&self, part: usize, elements: Range<usize>) {
        if let Some(bytes) = self.piece(part, elements) {
            self.maps[self.parts[part].file].will_need(bytes);
        }
    }
}

impl TiledTensor {
    /// Returns a tensor in one piece, in the file of this index.
    pub(super) fn whole(tensor: PickledTensor, file: usize, maps: &Arc<Vec<Mapping>>) -> TiledTensor {
        let shape = tensor.shape.clone();
        let part = TensorPart { file, offset: vec![0; shape.len()], tensor };
        TiledTensor::new(shape.clone(), shape, vec![part], maps).expect("a part tiles the tensor that it is")
    }

    /// Puts a tensor together from rectangles of `grid`, which has as many elements as `shape`.
    ///
    /// # Errors
    /// The reason if they do not cover it, each element once, or have different dtypes.
    pub(super) fn new(
        shape: Vec<usize>,
        grid: Vec<usize>,
        parts: Vec<TensorPart>,
        maps: &Arc<Vec<Mapping>>,
    ) -> Result<TiledTensor, String> {
        let dtype = parts.first().map(|part| part.tensor.dtype).ok_or("are missing")?;
        if let Some(other) = parts.iter().map(|part| part.tensor.dtype).find(|other| *other != dtype) {
            return Err(format!("have different dtypes ({dtype} and {other}): its files are of different saves"));
        }
        let tile = |(i, part): (usize, &TensorPart)| Tile::whole(part.offset.clone(), part.tensor.shape.clone(), i);
        let tiles = parts.iter().enumerate().map(tile).collect::<Option<Vec<Tile>>>().ok_or("are too large")?;
        let count = volume(&grid).ok_or("are too large")?;
        let tiling = Tiling::new(grid, tiles).map_err(|fault| match fault {
            TilingFault::Outside(_) => format!("{fault} {shape:?}"),
            TilingFault::Hole { .. } => format!("{fault}: the checkpoint is incomplete"),
            _ => fault.to_string(),
        })?;
        let parts = MappedParts { parts, maps: maps.clone() };
        let elements = TiledElements { tiling: Arc::new(tiling), count, size: dtype.bitsize() / 8, parts };
        Ok(TiledTensor { dtype, shape, elements })
    }

    /// Iterates over the parts, without empty ones.
    pub(super) fn parts(&self) -> impl Iterator<Item = &TensorPart> {
        self.elements.parts.parts.iter().filter(|part| !part.tensor.shape.contains(&0))
    }

    /// Returns the elements.
    pub(super) fn elements(&self) -> &dyn ScatteredElements {
        &self.elements
    }

    /// Returns the elements in C order, little endian, if a file has them so.
    pub(super) fn stored(&self) -> Option<&[u8]> {
        self.elements.piece(0..self.elements.len())
    }

    /// Copies all elements in C order, little endian.
    pub(super) fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.elements.len()];
        self.elements.copy(&mut bytes, 0);
        bytes
    }
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

    /// Returns two halves of a matrix of 4 x 4, the second of which is first in the file.
    fn halves() -> Vec<TensorPart> {
        let half = |offset, start| {
            let tensor = PickledTensor::plain(Dtype::U16, vec![4, 2], start).unwrap();
            TensorPart { file: 0, offset: vec![0, offset], tensor }
        };
        vec![half(0, 16), half(2, 0)]
    }

    #[test]
    fn parts_are_read_from_their_places() {
        let tensor = TiledTensor::new(vec![4, 4], vec![4, 4], halves(), &numbers(16)).unwrap();
        let read: Vec<u8> = tensor.read().into_iter().step_by(2).collect();
        assert_eq!(read, [8, 9, 0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 14, 15, 6, 7]);
        assert!(tensor.stored().is_none() && tensor.parts().count() == 2);
        let whole = TiledTensor::whole(halves()[0].tensor.clone(), 0, &numbers(16));
        assert_eq!(whole.stored(), Some(&whole.read()[..]));
        let empty = PickledTensor::plain(Dtype::U16, vec![0, 2], 0).unwrap();
        assert_eq!(TiledTensor::whole(empty, 0, &numbers(1)).stored(), Some(&[][..]));
    }

    #[test]
    fn parts_that_do_not_tile_are_named() {
        let new = |parts| TiledTensor::new(vec![4, 4], vec![4, 4], parts, &numbers(16)).err().unwrap();
        assert_eq!(new(halves()[..1].to_vec()), "hold 8 of its 16 elements: the checkpoint is incomplete");
        assert_eq!(new([halves(), halves()].concat()), "overlap");
        assert_eq!(new(vec![]), "are missing");
        let mut outside = halves();
        outside[1].offset[1] = 3;
        assert_eq!(new(outside), "lead out of its shape [4, 4]");
        let mut other = halves();
        other[1].tensor.dtype = Dtype::I16;
        assert_eq!(new(other), "have different dtypes (U16 and I16): its files are of different saves");
    }
}
