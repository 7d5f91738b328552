//! Tensors of the model that the files of a set hold, put together from their parts.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;

use super::part_places::{FilePlaces, PartPlace};
use super::read::StoredFile;
use super::tensors::StoredTensor;
use crate::error::{Difference, Error, Result};
use crate::tensor::{Tile, Tiling, TilingFault, byte_size, volume};

/// Location of a part: its file, and its position in the order of names there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PartLocation {
    pub file: usize,
    pub tensor: usize,
}

/// Tensor of the model, and the parts that tile it.
#[derive(Debug)]
pub(super) struct GlobalTensor {
    pub name: String,
    /// Dtype and shape of the whole. If some parts have half the precision, the dtype is f32.
    pub stored: StoredTensor,
    /// Rectangles of the tensor, or of the list of its elements.
    pub tiling: Arc<Tiling>,
    pub parts: Arc<[PartLocation]>,
    /// True if the only part is the whole tensor.
    pub is_whole: bool,
}

impl GlobalTensor {
    /// Returns the number of elements; `None` for elements smaller than a byte.
    pub(super) fn count(&self) -> Option<usize> {
        self.stored.range.len().checked_div(self.stored.dtype.bitsize() / 8)
    }
}

/// Part with the file that holds it.
struct FoundPart<'a> {
    location: PartLocation,
    file: &'a StoredFile,
    tensor: &'a StoredTensor,
    /// `None` for a tensor that is not a part.
    place: Option<&'a PartPlace>,
}

impl FoundPart<'_> {
    fn path(&self) -> &Path {
        self.file.path()
    }

    /// Shape of the whole tensor.
    fn global(&self) -> &[usize] {
        self.place.map_or(&self.tensor.shape, |place| &place.global)
    }

    fn is_flat(&self) -> bool {
        self.place.is_some_and(PartPlace::is_flat)
    }

    fn offset(&self) -> Vec<usize> {
        self.place.map_or_else(|| vec![0; self.tensor.shape.len()], |place| place.offset.clone())
    }

    fn shown(&self) -> String {
        format!("{:?} at {:?}", self.tensor.shape, self.offset())
    }
}

/// Puts the tensors of some files together, in the order of their names.
///
/// # Errors
/// [`Error::Damaged`] or [`Error::Mismatch`] for parts that do not fit together, with a file and the tensor.
pub(super) fn assemble(files: &[StoredFile], places: &[Option<Arc<FilePlaces>>]) -> Result<Vec<GlobalTensor>> {
    let entry = |location: &PartLocation| files[location.file].tensors().at(location.tensor);
    let of_file = |(file, stored): (usize, &StoredFile)| {
        (0..stored.tensors().len()).map(move |tensor| PartLocation { file, tensor })
    };
    let mut locations: Vec<PartLocation> = files.iter().enumerate().flat_map(of_file).collect();
    // The sort is stable: parts of one tensor stay in the order of their files.
    locations.sort_by_key(|location| entry(location).0);
    let mut tensors = Vec::new();
    for group in locations.chunk_by(|a, b| entry(a).0 == entry(b).0) {
        let found = |location: &PartLocation| FoundPart {
            location: *location,
            file: &files[location.file],
            tensor: entry(location).1,
            place: places[location.file].as_ref().map(|file| &file.places[location.tensor]),
        };
        let parts: Vec<FoundPart<'_>> = group.iter().map(found).collect();
        tensors.push(put_together(entry(&group[0]).0, &parts)?);
    }
    Ok(tensors)
}

fn put_together(name: &str, parts: &[FoundPart<'_>]) -> Result<GlobalTensor> {
    let first = &parts[0];
    if let [_, second, ..] = parts
        && parts.iter().all(|part| part.place.is_none())
    {
        return Err(Error::damaged(second.path(), format!("tensor `{name}` is in another shard too")));
    }
    for part in parts {
        let differs = |what: &str, expected: String, found: String| {
            let difference = Difference::new(format!("the {what} of tensor `{name}`"), expected, found);
            Err(Error::mismatch(part.path(), first.path(), difference))
        };
        if part.global() != first.global() {
            return differs("whole shape", format!("{:?}", first.global()), format!("{:?}", part.global()));
        }
        if part.is_flat() != first.is_flat() {
            return differs("kind of cut", first.shown(), part.shown());
        }
        if common_dtype(part.tensor.dtype, first.tensor.dtype).is_none() {
            return differs("dtype", first.tensor.dtype.to_string(), part.tensor.dtype.to_string());
        }
    }
    let dtypes = parts.iter().map(|part| part.tensor.dtype);
    let dtype = dtypes.fold(first.tensor.dtype, |all, own| common_dtype(all, own).unwrap_or(all));
    let shape = first.global().to_vec();
    let size = byte_size(name, dtype, &shape).map_err(|error| Error::damaged(first.path(), error))?;
    let tiling = tiling(name, parts, &shape)?;
    let is_whole = parts.len() == 1 && !first.is_flat();
    Ok(GlobalTensor {
        name: name.to_owned(),
        stored: StoredTensor { dtype, shape, range: Range { start: 0, end: size } },
        tiling: Arc::new(tiling),
        parts: parts.iter().map(|part| part.location).collect(),
        is_whole,
    })
}

/// Returns the dtype in which the elements of both are exact. A process stores a part in f32 if a value of it is beyond
/// the range of f16.
fn common_dtype(a: Dtype, b: Dtype) -> Option<Dtype> {
    let is_widened = |dtype| matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32);
    if a == b { Some(a) } else { (is_widened(a) && is_widened(b)).then_some(Dtype::F32) }
}

fn tiling(name: &str, parts: &[FoundPart<'_>], shape: &[usize]) -> Result<Tiling> {
    let first = &parts[0];
    let count = volume(shape).unwrap_or(usize::MAX);
    let grid = if first.is_flat() { vec![count] } else { shape.to_vec() };
    let mut tiles = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let tile = Tile::whole(part.offset(), part.tensor.shape.clone(), i);
        let too_large = || Error::damaged(part.path(), format!("its part of tensor `{name}` is too large"));
        tiles.push(tile.ok_or_else(too_large)?);
    }
    Tiling::new(grid, tiles).map_err(|fault| match fault {
        TilingFault::TooLarge => {
            Error::damaged(first.path(), format!("tensor `{name}` of shape {shape:?} is too large"))
        }
        TilingFault::Outside(i) => {
            let why = format!("its part of tensor `{name}`, {}, leads out of the shape {shape:?}", parts[i].shown());
            Error::damaged(parts[i].path(), why)
        }
        TilingFault::Overlap(i, other) => {
            let why = format!(
                "its part of tensor `{name}`, {}, overlaps that of {}, {}",
                parts[other].shown(),
                parts[i].path().display(),
                parts[i].shown()
            );
            Error::damaged(parts[other].path(), why)
        }
        TilingFault::Hole { covered, whole } => {
            let why = format!(
                "the parts of tensor `{name}` in this file and the others of its set hold {covered} of its {whole} \
                 elements: move the set out of the directory"
            );
            Error::damaged(first.path(), why)
        }
    })
}
