//! Files that together hold the tensors of a model, each of them whole or in parts.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::global_tensor::{GlobalTensor, PartLocation, assemble};
use super::part_places::{FilePlaces, PartPlace};
use super::read::StoredFile;
use super::tensors::StoredTensor;
use crate::error::{Error, Result};
use crate::tensor::{ElementRange, Rows, ScatteredElements, TensorParts, TiledElements, copy_each_row};

/// Files of a snapshot or a live state as one set of tensors.
#[derive(Debug)]
pub(crate) struct TensorSet {
    files: Arc<Vec<StoredFile>>,
    /// Places of the tensors of each file that holds parts.
    places: Vec<Option<Arc<FilePlaces>>>,
    /// Tensors in the order of their names.
    tensors: Arc<Vec<GlobalTensor>>,
    /// Elements of the tensors in several parts, made when they are first read.
    tiled: OnceLock<Vec<OnceLock<TiledElements<FileParts>>>>,
}

/// Elements of a stored tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) enum StoredElements<'a> {
    /// Bytes of a mapped file.
    Whole(&'a [u8]),
    /// Parts in several files.
    Tiled(&'a dyn ScatteredElements),
}

/// Parts of a tensor in their files.
#[derive(Clone, Debug)]
pub(crate) struct FileParts {
    files: Arc<Vec<StoredFile>>,
    parts: Arc<[PartLocation]>,
    /// Dtype of the whole tensor.
    dtype: Dtype,
}

/// Rectangle of a tensor, or a range of its elements, in the C order of its own.
#[derive(Debug)]
pub(crate) struct Region {
    pub dtype: Dtype,
    pub elements: Box<dyn ScatteredElements + Send>,
}

impl TensorSet {
    /// Opens files and checks that they belong together: each element of each tensor is there once. Faster if they
    /// agree with the files of a sibling.
    ///
    /// With `is_mapped`, the files stay readable even if they are removed.
    ///
    /// # Errors
    /// Those of [`StoredFile::open`]; [`Error::Damaged`] or [`Error::Mismatch`] for parts that do not fit together.
    pub(crate) fn open(paths: &[PathBuf], sibling: Option<&TensorSet>, is_mapped: bool) -> Result<TensorSet> {
        let open = |(i, path): (usize, &PathBuf)| {
            let like = sibling.and_then(|sibling| sibling.files.get(i));
            let file = match is_mapped {
                true => StoredFile::open_like(path, like).and_then(|file| file.check_header().map(|()| file)),
                false => StoredFile::open_unmapped(path, like),
            }?;
            let known = sibling.and_then(|sibling| sibling.places.get(i)?.as_ref());
            let places = FilePlaces::read(&file, known)?;
            Ok((file, places))
        };
        let opened: Vec<Result<_>> = if paths.len() < 8 {
            paths.iter().enumerate().map(open).collect()
        } else {
            paths.par_iter().enumerate().map(open).collect()
        };
        let (files, places): (Vec<_>, Vec<_>) = opened.into_iter().collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let shared = sibling.filter(|sibling| has_tensors_of(&files, &places, sibling));
        let tensors = match shared {
            Some(sibling) => sibling.tensors.clone(),
            None => Arc::new(assemble(&files, &places)?),
        };
        Ok(TensorSet { files: Arc::new(files), places, tensors, tiled: OnceLock::new() })
    }

    /// Returns the files.
    pub(crate) fn files(&self) -> &[StoredFile] {
        &self.files
    }

    /// Returns true for the files of a sharded training.
    pub(crate) fn has_parts(&self) -> bool {
        self.places.iter().any(Option::is_some)
    }

    /// Iterates over all tensors, by name. Shapes are those of whole tensors.
    pub(crate) fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|tensor| (tensor.name.as_str(), &tensor.stored))
    }

    /// Returns true if names, shapes and dtypes are known to equal those of a sibling.
    pub(super) fn shares_tensors(&self, other: &TensorSet) -> bool {
        Arc::ptr_eq(&self.tensors, &other.tensors)
    }

    /// Finds a tensor. `near` is a guess of its position in the order of names.
    pub(super) fn find(&self, name: &str, near: usize) -> Option<usize> {
        if self.tensors.get(near).is_some_and(|tensor| tensor.name == name) {
            return Some(near);
        }
        self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()
    }

    /// Returns the tensor at a position in the order of names.
    pub(super) fn at(&self, place: usize) -> &GlobalTensor {
        &self.tensors[place]
    }

    /// Returns the tensor of a name.
    pub(crate) fn get(&self, name: &str) -> Option<&StoredTensor> {
        Some(&self.tensors[self.find(name, 0)?].stored)
    }

    /// Returns the bytes of a tensor that is in one piece.
    ///
    /// # Errors
    /// As [`TensorSet::elements`].
    pub(crate) fn whole(&self, name: &str) -> Result<Option<&[u8]>> {
        let Some(place) = self.find(name, 0).filter(|&place| self.tensors[place].is_whole) else { return Ok(None) };
        Ok(if let StoredElements::Whole(bytes) = self.elements(place)? { Some(bytes) } else { None })
    }

    /// Returns the elements of the tensor at a position, and maps the files that hold them.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be mapped, [`Error::Damaged`] if it has changed.
    pub(crate) fn elements(&self, place: usize) -> Result<StoredElements<'_>> {
        let tensor = &self.tensors[place];
        if tensor.is_whole {
            let PartLocation { file, tensor } = tensor.parts[0];
            let file = &self.files[file];
            file.mapped()?;
            return Ok(StoredElements::Whole(file.bytes(file.tensors().at(tensor).1)));
        }
        let all = self.tiled.get_or_init(|| self.tensors.iter().map(|_| OnceLock::new()).collect());
        if let Some(tiled) = all[place].get() {
            return Ok(StoredElements::Tiled(tiled));
        }
        let tiled = self.tiled(tensor)?;
        Ok(StoredElements::Tiled(all[place].get_or_init(|| tiled)))
    }

    fn tiled(&self, tensor: &GlobalTensor) -> Result<TiledElements<FileParts>> {
        tensor.parts.iter().try_for_each(|part| self.files[part.file].mapped().map(drop))?;
        let dtype = tensor.stored.dtype;
        let size = dtype.bitsize() / 8;
        if size == 0 {
            return Err(Error::tensor(
                &tensor.name,
                format!("parts of {dtype} cannot be read: store the tensor whole"),
            ));
        }
        let parts = FileParts { files: self.files.clone(), parts: tensor.parts.clone(), dtype };
        Ok(TiledElements { tiling: tensor.tiling.clone(), count: tensor.stored.range.len() / size, size, parts })
    }

    /// Maps all files that are not mapped yet.
    ///
    /// # Errors
    /// As [`TensorSet::elements`].
    pub(crate) fn map_files(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.mapped().map(drop))
    }

    /// Cuts the part of a process out of a tensor: `shape` is that of the part. Its elements are in the C order of the
    /// part. Returns `None` if no tensor has that name.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the part is of another shape than the tensor, or leads out of it, and as
    /// [`TensorSet::elements`].
    pub(crate) fn region(&self, name: &str, part: &PartPlace, shape: &[usize]) -> Result<Option<Region>> {
        let Some(place) = self.find(name, 0) else { return Ok(None) };
        let tensor = &self.tensors[place];
        let StoredTensor { dtype, shape: global, .. } = &tensor.stored;
        let whole = self.tiled(tensor)?;
        let grid = if part.is_flat() { vec![whole.count] } else { global.clone() };
        let fits = |(i, &extent): (usize, &usize)| part.offset[i].checked_add(extent).is_some_and(|end| end <= grid[i]);
        let is_within = part.global == *global
            && part.offset.len() == grid.len()
            && shape.len() == grid.len()
            && shape.iter().enumerate().all(fits);
        if !is_within {
            let why =
                format!("a part {shape:?} at {:?} of {:?} is not in its shape {global:?}", part.offset, part.global);
            return Err(Error::tensor(name, why));
        }
        let count: usize = shape.iter().product();
        let elements: Box<dyn ScatteredElements + Send> = if part.is_flat() {
            let start = part.offset[0] * whole.size;
            Box::new(ElementRange { range: start..start + count * whole.size, tensor: whole })
        } else {
            let is_list = whole.tiling.grid().len() != global.len();
            let tiling = match is_list {
                true => whole.tiling.unflattened(global).region(&part.offset, shape),
                false => whole.tiling.region(&part.offset, shape),
            };
            Box::new(TiledElements { tiling: Arc::new(tiling), count, ..whole })
        };
        Ok(Some(Region { dtype: *dtype, elements }))
    }

    /// Drops the metadata of all files but the first.
    pub(super) fn forget_metadata(&mut self) {
        let files = Arc::get_mut(&mut self.files).into_iter().flat_map(|files| files.iter_mut().skip(1));
        files.for_each(StoredFile::forget_metadata);
    }
}

/// Returns true if files are known to have the same tensors in the same places as those of a sibling.
fn has_tensors_of(files: &[StoredFile], places: &[Option<Arc<FilePlaces>>], sibling: &TensorSet) -> bool {
    let same_places = |(own, other): (&Option<Arc<FilePlaces>>, &Option<Arc<FilePlaces>>)| match (own, other) {
        (Some(own), Some(other)) => Arc::ptr_eq(own, other),
        (own, other) => own.is_none() && other.is_none(),
    };
    files.len() == sibling.files.len()
        && files.iter().zip(sibling.files.iter()).all(|(own, other)| own.shares_tensors(other))
        && places.iter().zip(&sibling.places).all(same_places)
}

/// Converts elements of a part in half precision to f32, the dtype of the whole tensor. That is exact.
pub(super) fn widen(dst: &mut [u8], stored: &[u8], dtype: Dtype) {
    for (wide, half) in dst.as_chunks_mut::<4>().0.iter_mut().zip(stored.as_chunks::<2>().0) {
        let value = match dtype {
            Dtype::BF16 => bf16::from_le_bytes(*half).to_f32(),
            _ => f16::from_le_bytes(*half).to_f32(),
        };
        *wide = value.to_le_bytes();
    }
}

impl FileParts {
    fn part(&self, part: usize) -> (&StoredFile, &StoredTensor) {
        let PartLocation { file, tensor } = self.parts[part];
        let file = &self.files[file];
        (file, file.tensors().at(tensor).1)
    }
}

impl TensorParts for FileParts {
    fn piece(&self, part: usize, elements: Range<usize>) -> Option<&[u8]> {
        let (file, tensor) = self.part(part);
        let size = self.dtype.bitsize() / 8;
        (tensor.dtype == self.dtype).then(|| file.bytes(tensor).get(elements.start * size..elements.end * size))?
    }

    fn copy(&self, part: usize, dst: &mut [u8], first: usize) {
        let (file, tensor) = self.part(part);
        let size = tensor.dtype.bitsize() / 8;
        let count = dst.len() * 8 / self.dtype.bitsize();
        let stored = &file.bytes(tensor)[first * size..(first + count) * size];
        if tensor.dtype == self.dtype {
            dst.copy_from_slice(stored);
            return;
        }
        widen(dst, stored, tensor.dtype);
    }

    fn copy_rows(&self, dst: &mut [u8], rows: &Rows, size: usize) {
        let Rows { first, count, stride, part_stride } = rows;
        let (file, tensor) = self.part(first.part);
        if tensor.dtype != self.dtype {
            return copy_each_row(self, dst, rows, size);
        }
        let stored = file.bytes(tensor);
        let length = first.elements.len() * size;
        for i in 0..*count {
            let (to, from) = (i * stride * size, (first.first + i * part_stride) * size);
            dst[to..to + length].copy_from_slice(&stored[from..from + length]);
        }
    }

    fn will_need(&self, part: usize, elements: Range<usize>) {
        let (file, tensor) = self.part(part);
        let size = tensor.dtype.bitsize() / 8;
        if let Some(bytes) = file.bytes(tensor).get(elements.start * size..elements.end * size) {
            file.will_need(bytes);
        }
    }
}
