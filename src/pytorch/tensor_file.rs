//! Tensors of a checkpoint, in its mapped files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;

use super::number::{Number, number};
use super::tensor::PickledTensor;
use super::tiled::{TensorPart, TiledTensor};
use crate::error::{Error, Result};
use crate::fs::Mapping;
use crate::tensor::{ScatteredElements, TensorSpec, equal_elements};

/// Mapped files with the places of their tensors.
#[derive(Debug)]
pub struct TensorFile {
    pub(super) path: PathBuf,
    pub(super) maps: Arc<Vec<Mapping>>,
    pub(super) tensors: BTreeMap<String, TiledTensor>,
}

/// Part of a tensor: a rectangle whose elements follow each other in a file.
#[derive(Debug)]
pub struct Rectangle {
    /// Name of the tensor.
    pub name: String,
    /// Index of the file.
    pub file: usize,
    /// Element type.
    pub dtype: Dtype,
    /// Extents of the rectangle.
    pub shape: Vec<usize>,
    /// Index of its first element along each dimension of the tensor.
    pub offset: Vec<usize>,
    /// Byte of the file at which the elements begin.
    pub start: usize,
}

impl TensorFile {
    /// Puts tensors together from rectangles in mapped files. A tensor's shape is where its last rectangles end.
    ///
    /// # Errors
    /// [`Error::Damaged`] if rectangles of a tensor do not cover it.
    pub(crate) fn from_rectangles(path: &Path, maps: Vec<Mapping>, rectangles: Vec<Rectangle>) -> Result<TensorFile> {
        let maps = Arc::new(maps);
        let mut parts: BTreeMap<String, Vec<TensorPart>> = BTreeMap::new();
        for Rectangle { name, file, dtype, shape, offset, start } in rectangles {
            let tensor = PickledTensor::plain(dtype, shape, start).filter(|tensor| tensor.ends_within(&maps[file]));
            let tensor =
                tensor.ok_or_else(|| Error::damaged(path, format!("tensor `{name}` leads out of its file")))?;
            parts.entry(name).or_default().push(TensorPart { file, offset, tensor });
        }
        let mut tensors = BTreeMap::new();
        for (name, parts) in parts {
            let wrong = |why| Error::damaged(path, format!("the parts of tensor `{name}` {why}"));
            let shape = bounding_shape(&parts).ok_or_else(|| wrong("lead out of any shape".to_owned()))?;
            let tensor = TiledTensor::new(shape.clone(), shape, parts, &maps).map_err(wrong)?;
            tensors.insert(name, tensor);
        }
        Ok(TensorFile { path: path.to_owned(), maps, tensors })
    }

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
        Ok(self.tensor(name)?.read())
    }

    /// Returns the elements of a tensor in C order, little endian, if a file has them so.
    pub fn stored(&self, name: &str) -> Option<&[u8]> {
        self.tensors.get(name)?.stored()
    }

    /// Returns the elements of a tensor, wherever they are.
    pub fn scattered(&self, name: &str) -> Option<&dyn ScatteredElements> {
        self.tensors.get(name).map(TiledTensor::elements)
    }

    /// Returns true if another file has a tensor of this name with the same bytes.
    pub fn equals(&self, other: &TensorFile, name: &str) -> bool {
        match (self.scattered(name), other.scattered(name)) {
            (Some(own), Some(others)) => equal_elements(own, others),
            _ => false,
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

/// Returns the smallest shape that holds all parts; `None` if they have other numbers of dimensions.
fn bounding_shape(parts: &[TensorPart]) -> Option<Vec<usize>> {
    let mut shape = vec![0; parts.first()?.offset.len()];
    for part in parts {
        if part.offset.len() != shape.len() || part.tensor.shape.len() != shape.len() {
            return None;
        }
        for (whole, (offset, extent)) in shape.iter_mut().zip(part.offset.iter().zip(&part.tensor.shape)) {
            *whole = offset.checked_add(*extent)?.max(*whole);
        }
    }
    Some(shape)
}
