//! Places of the tensors of a part file in the tensors of the whole model, in PyTorch's form and ours.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::meta::{OF_TENSORS, check_version, parts_strings};
use super::read::StoredFile;
use crate::error::{Error, Result};

/// Key of the version of PyTorch's form, as in `torch.distributed.checkpoint`.
const DCP_VERSION: &str = "DCP_VERSION";

/// Key of the offsets of all tensors, as in `torch.distributed.checkpoint`.
const DCP_SHARDING_INFO: &str = "DCP_SHARDING_INFO";

/// Key of the shapes of the whole tensors.
const GLOBAL_SHAPES: &str = "global_shapes";

/// Place of a part in its tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PartPlace {
    /// Shape of the whole tensor.
    pub global: Vec<usize>,
    /// Index along each dimension of the part's first element. A single index into the flattened tensor if the part is
    /// a range of it.
    pub offset: Vec<usize>,
}

#[derive(Serialize, Deserialize)]
struct SavedOffsets {
    saved_offsets: Vec<usize>,
}

/// Returns the strings that describe the parts of a file, by the names of their tensors. They replace the version.
pub(crate) fn place_strings<'a>(
    places: impl Iterator<Item = (&'a str, &'a PartPlace)> + Clone,
) -> BTreeMap<String, String> {
    let offsets: BTreeMap<&str, SavedOffsets> =
        places.clone().map(|(name, place)| (name, SavedOffsets { saved_offsets: place.offset.clone() })).collect();
    let shapes: BTreeMap<&str, &Vec<usize>> = places.map(|(name, place)| (name, &place.global)).collect();
    let mut strings = parts_strings();
    strings.insert(DCP_VERSION.into(), "1.0".into());
    strings.insert(DCP_SHARDING_INFO.into(), serde_json::json!(offsets).to_string());
    strings.insert(GLOBAL_SHAPES.into(), serde_json::json!(shapes).to_string());
    strings
}

/// Places of all tensors of a part file, in the order of their names.
#[derive(Debug)]
pub(super) struct FilePlaces {
    /// Strings of the metadata that concern its tensors.
    strings: Vec<Option<String>>,
    pub places: Vec<PartPlace>,
}

impl FilePlaces {
    /// Reads the places of the tensors of a file; `None` for a file without parts. They are shared with a sibling if
    /// all metadata of the tensors are equal.
    ///
    /// # Errors
    /// [`Error::Damaged`] if a tensor has no place, or one that cannot be; [`Error::Unexpected`] for a file of no run.
    pub(super) fn read(file: &StoredFile, sibling: Option<&Arc<FilePlaces>>) -> Result<Option<Arc<FilePlaces>>> {
        check_version(file.path(), file.metadata())?;
        let string = |key: &str| file.metadata().get(key);
        let Some(shapes) = string(GLOBAL_SHAPES) else { return Ok(None) };
        let missing = || Error::damaged(file.path(), format!("the metadata lack `{DCP_SHARDING_INFO}`"));
        let offsets = string(DCP_SHARDING_INFO).ok_or_else(missing)?;
        let keys = [DCP_SHARDING_INFO, GLOBAL_SHAPES].iter().chain(OF_TENSORS);
        if let Some(sibling) = sibling
            && keys.clone().zip(&sibling.strings).all(|(key, known)| string(key) == known.as_ref())
        {
            return Ok(Some(sibling.clone()));
        }
        let places = parse_places(file, offsets, shapes)?;
        Ok(Some(Arc::new(FilePlaces { strings: keys.map(|key| string(key).cloned()).collect(), places })))
    }
}

fn parse_places(file: &StoredFile, offsets: &str, shapes: &str) -> Result<Vec<PartPlace>> {
    let path = file.path();
    let mut offsets: BTreeMap<String, SavedOffsets> = parse(path, DCP_SHARDING_INFO, offsets)?;
    let mut shapes: BTreeMap<String, Vec<usize>> = parse(path, GLOBAL_SHAPES, shapes)?;
    let mut places = Vec::with_capacity(file.tensors().len());
    for (name, tensor) in file.tensors().iter() {
        let (Some(SavedOffsets { saved_offsets: offset }), Some(global)) = (offsets.remove(name), shapes.remove(name))
        else {
            return Err(Error::damaged(path, format!("the metadata have no place for tensor `{name}`")));
        };
        let place = PartPlace { global, offset };
        if place.offset.len() != tensor.shape.len() || (!place.is_flat() && place.offset.len() != place.global.len()) {
            let why = format!(
                "the metadata put tensor `{name}` of shape {:?} at {:?} of the shape {:?}, which cannot be",
                tensor.shape, place.offset, place.global
            );
            return Err(Error::damaged(path, why));
        }
        places.push(place);
    }
    Ok(places)
}

impl PartPlace {
    /// Returns true for a range of the flattened tensor.
    pub(super) fn is_flat(&self) -> bool {
        self.offset.len() == 1 && self.global.len() != 1
    }
}

fn parse<T: DeserializeOwned>(path: &Path, key: &str, text: &str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|error| Error::damaged(path, format!("the metadata's `{key}` cannot be parsed: {error}")))
}
