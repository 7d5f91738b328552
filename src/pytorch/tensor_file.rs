//! Tensors of a checkpoint, in its mapped files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::number::{Number, number};
use super::tensor::PickledTensor;
use crate::error::{Error, Result};
use crate::fs::Mapping;
use crate::tensor::TensorSpec;

/// Mapped files with the places of their tensors.
#[derive(Debug)]
pub struct TensorFile {
    pub(super) path: PathBuf,
    pub(super) maps: Vec<Mapping>,
    pub(super) tensors: BTreeMap<String, TiledTensor>,
}

/// Tensor that is in one piece, or in rectangles that tile it.
#[derive(Debug)]
pub(super) struct TiledTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub parts: Vec<TensorPart>,
}

/// Rectangle of a tensor.
#[derive(Debug)]
pub(super) struct TensorPart {
    /// Index of the file.
    pub file: usize,
    /// Index of its first element along each dimension.
    pub offset: Vec<usize>,
    pub tensor: PickledTensor,
}

impl TiledTensor {
    /// Returns a tensor in one piece, in the first file.
    pub(super) fn whole(tensor: PickledTensor) -> TiledTensor {
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        let offset = vec![0; shape.len()];
        TiledTensor { dtype, shape, parts: vec![TensorPart { file: 0, offset, tensor }] }
    }

    /// Copies the elements of all rectangles to their places.
    fn assemble(&self, maps: &[Mapping]) -> Vec<u8> {
        let size = self.dtype.bitsize() / 8;
        let mut elements = vec![0; self.shape.iter().product::<usize>() * size];
        for part in &self.parts {
            let bytes = part.tensor.read(&maps[part.file]);
            let shape = &part.tensor.shape;
            let run = shape.last().copied().unwrap_or(1).max(1) * size;
            for (i, row) in bytes.chunks_exact(run).enumerate() {
                let start = self.index_of_row(part, i) * size;
                elements[start..start + run].copy_from_slice(row);
            }
        }
        elements
    }

    /// Returns the index of the first element of a part's row: its elements along the last dimension.
    fn index_of_row(&self, part: &TensorPart, mut row: usize) -> usize {
        let rank = self.shape.len();
        let mut index = 0;
        let mut stride = 1;
        for i in (0..rank).rev() {
            let mut place = part.offset[i];
            if i + 1 < rank {
                place += row % part.tensor.shape[i];
                row /= part.tensor.shape[i];
            }
            index += place * stride;
            stride *= self.shape[i];
        }
        index
    }
}

impl TensorFile {
    /// Path of the file, or of the folder of the files.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns true if there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns the name, dtype and shape of a tensor.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the tensor is missing.
    pub fn spec(&self, name: &str) -> Result<TensorSpec> {
        let tensor = self.tensor(name)?;
        Ok(TensorSpec { name: name.to_owned(), dtype: tensor.dtype, shape: tensor.shape.clone() })
    }

    /// Reads the elements of a tensor in C order, little endian, whatever its strides and parts.
    ///
    /// # Errors
    /// As [`TensorFile::spec`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let tensor = self.tensor(name)?;
        Ok(match tensor.parts.as_slice() {
            [part] => part.tensor.read(&self.maps[part.file]),
            _ => tensor.assemble(&self.maps),
        })
    }

    /// Returns the elements of a tensor in C order, little endian, if a file has them so.
    pub fn stored(&self, name: &str) -> Option<&[u8]> {
        match self.tensors.get(name)?.parts.as_slice() {
            [part] => part.tensor.stored(&self.maps[part.file]),
            _ => None,
        }
    }

    /// Starts to read bytes of the files from the disk in the background.
    pub fn will_need(&self, bytes: &[u8]) {
        self.maps.iter().for_each(|map| map.will_need(bytes));
    }

    /// Reads a tensor of one element as a number.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the tensor has more elements or none, or is not a number. Otherwise as
    /// [`TensorFile::spec`].
    pub fn number(&self, name: &str) -> Result<Number> {
        let spec = self.spec(name)?;
        if spec.shape.iter().product::<usize>() != 1 {
            let why = format!("`{name}` has the shape {:?}; a single number is expected", spec.shape);
            return Err(Error::unexpected(&self.path, why));
        }
        let bytes = self.read(name)?;
        number(spec.dtype, &bytes).ok_or_else(|| {
            Error::unexpected(&self.path, format!("`{name}` of dtype {} cannot be read as a number", spec.dtype))
        })
    }

    fn tensor(&self, name: &str) -> Result<&TiledTensor> {
        self.tensors.get(name).ok_or_else(|| Error::unexpected(&self.path, format!("it has no tensor `{name}`")))
    }
}
