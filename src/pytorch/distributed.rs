//! Folders of `torch.distributed.checkpoint`: tensors in rectangles, each a small archive within a file of a process.
//!
//! `.metadata` is a pickle that names the rectangles of each tensor, and for each rectangle the file and the bytes of
//! it in which `torch.save` wrote it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::file::{PickledFile, map_file, parse_archive};
use super::pickle::{MemoryBudget, NodeId, Pickle};
use super::storage;
use super::tensor::{NotRead, PickledTensor, TensorReader};
use super::tensor_file::TensorFile;
use super::tiled::{TensorPart, TiledTensor};
use crate::error::{Error, Result};
use crate::fs::Mapping;

/// File that lists the contents of such a folder.
const METADATA: &str = ".metadata";

/// Bytes that the pickle of one rectangle may take.
const PART_MEMORY: usize = 1 << 20;

/// Folder whose list of contents is parsed.
#[derive(Debug)]
pub struct DistributedCheckpoint {
    file: PickledFile,
    folder: PathBuf,
}

/// Place of an entry of the folder.
struct StoragePlace<'a> {
    file: usize,
    /// Name of the file.
    path: &'a str,
    start: usize,
    end: usize,
}

impl DistributedCheckpoint {
    /// Reads the list of a folder's contents.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Damaged`] if it is not such a list.
    pub fn open(folder: &Path) -> Result<DistributedCheckpoint> {
        let file = PickledFile::open_plain(&folder.join(METADATA))?;
        Ok(DistributedCheckpoint { file, folder: folder.to_owned() })
    }

    /// Lists the entries: the keys that lead to each, joined by dots, and true for a tensor.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn entries(&self) -> Result<Vec<(String, bool)>> {
        let is_tensor = |id| self.pickle().attribute(id, "chunks").is_some();
        Ok(self.named("state_dict_metadata")?.into_iter().map(|(name, id)| (name, is_tensor(id))).collect())
    }

    /// Maps the files and reads the tensors of some names without their elements. `rename` gives the name of a tensor,
    /// or `None` to leave it out.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Damaged`], with the file; [`Error::Unexpected`] for tensors that are compressed, of a
    /// kind that is not read, or in files of different saves.
    pub fn read(&self, rename: &dyn Fn(&str) -> Option<String>) -> Result<TensorFile> {
        let mut maps = Vec::new();
        let places = self.places(&mut maps)?;
        let maps = Arc::new(maps);
        let mut tensors = BTreeMap::new();
        for (stored_name, id) in self.named("state_dict_metadata")? {
            if let Some(name) = rename(&stored_name).filter(|_| self.pickle().attribute(id, "chunks").is_some()) {
                tensors.insert(name, self.tensor(&stored_name, id, &places, &maps)?);
            }
        }
        Ok(TensorFile { path: self.folder.clone(), maps, tensors })
    }

    fn pickle(&self) -> &Pickle {
        &self.file.pickle
    }

    fn damaged(&self, why: impl std::fmt::Display) -> Error {
        Error::damaged(&self.file.path, why)
    }

    /// Lists the entries of a dict of the metadata whose keys are names.
    fn named(&self, attribute: &str) -> Result<Vec<(String, NodeId)>> {
        let pickle = self.pickle();
        let entries = self.dict(attribute)?;
        Ok(entries.iter().filter_map(|(key, value)| Some((pickle.text(*key)?.to_owned(), *value))).collect())
    }

    fn dict(&self, attribute: &str) -> Result<&[(NodeId, NodeId)]> {
        let pickle = self.pickle();
        let dict = pickle.attribute(pickle.root(), attribute).and_then(|dict| pickle.entries(dict));
        dict.ok_or_else(|| {
            self.damaged(format!("it has no `{attribute}`, as `torch.distributed.checkpoint` writes it"))
        })
    }

    /// Finds the places of all rectangles, by the tensor and the offset, and maps the files.
    fn places(&self, maps: &mut Vec<Mapping>) -> Result<BTreeMap<(String, Vec<usize>), StoragePlace<'_>>> {
        let pickle = self.pickle();
        let mut files: BTreeMap<String, usize> = BTreeMap::new();
        let mut places = BTreeMap::new();
        for (key, value) in self.dict("storage_data")? {
            let name = pickle.attribute(*key, "fqn").and_then(|name| pickle.text(name));
            let offset = pickle.attribute(*key, "offset").and_then(|offset| pickle.sizes(offset));
            // An entry that is not a tensor has no offset.
            let (Some(name), Some(offset)) = (name, offset) else { continue };
            let path = pickle.attribute(*value, "relative_path").and_then(|path| pickle.text(path));
            let number = |attribute| usize::try_from(pickle.int(pickle.attribute(*value, attribute)?)?).ok();
            let (Some(path), Some(start), Some(length)) = (path, number("offset"), number("length")) else {
                return Err(self.damaged(format!("tensor `{name}` has no place")));
            };
            let transforms = pickle.attribute(*value, "transform_descriptors");
            if transforms.is_some_and(|list| pickle.items(list).is_some_and(|list| !list.is_empty())) {
                let why = format!("tensor `{name}` is compressed: load the checkpoint with PyTorch, save it without");
                return Err(Error::unexpected(&self.file.path, why));
            }
            let file = match files.get(path) {
                Some(file) => *file,
                None => {
                    maps.push(self.map(path)?);
                    *files.entry(path.to_owned()).or_insert(maps.len() - 1)
                }
            };
            let end = start.checked_add(length).filter(|&end| end <= maps[file].len()).ok_or_else(|| {
                let why = format!("tensor `{name}` ends after it: the file is incomplete");
                Error::damaged(&self.folder.join(path), why)
            })?;
            places.insert((name.to_owned(), offset), StoragePlace { file, path, start, end });
        }
        Ok(places)
    }

    /// Maps a file of the folder.
    fn map(&self, name: &str) -> Result<Mapping> {
        let path = Path::new(name);
        let is_inside = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !is_inside {
            return Err(self.damaged(format!("it names the file `{name}`, which is not in the folder")));
        }
        map_file(&self.folder.join(path))
    }

    /// Reads a tensor: its rectangles, which must tile it.
    fn tensor(
        &self,
        name: &str,
        id: NodeId,
        places: &BTreeMap<(String, Vec<usize>), StoragePlace<'_>>,
        maps: &Arc<Vec<Mapping>>,
    ) -> Result<TiledTensor> {
        let pickle = self.pickle();
        let shape = pickle.attribute(id, "size").and_then(|size| pickle.sizes(size));
        let chunks = pickle.attribute(id, "chunks").and_then(|chunks| pickle.items(chunks)).unwrap_or_default();
        let shape = shape.ok_or_else(|| self.damaged(format!("tensor `{name}` has no size")))?;
        if self.is_reshaped(name) {
            let why = format!(
                "tensor `{name}` is stored in another shape by Megatron: leave it out with --leave-out (`leave_out`)"
            );
            return Err(Error::unexpected(&self.file.path, why));
        }
        let listed_dtype = self.listed_dtype(id);
        let mut parts: Vec<TensorPart> = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let attribute = |key| pickle.attribute(*chunk, key).and_then(|value| pickle.sizes(value));
            let (Some(offset), Some(extent)) = (attribute("offsets"), attribute("sizes")) else {
                return Err(self.damaged(format!("a part of tensor `{name}` has no place")));
            };
            let place = places.get(&(name.to_owned(), offset.clone())).ok_or_else(|| {
                self.damaged(format!(
                    "the part of tensor `{name}` at {offset:?} is missing: the checkpoint is incomplete"
                ))
            })?;
            let tensor = self.part(name, place, &maps[place.file])?;
            if tensor.shape != extent {
                let [found, listed] = [&tensor.shape, &extent].map(|shape| format!("of shape {shape:?}"));
                return Err(self.unlike(name, place, &found, &listed));
            }
            if let Some(listed) = listed_dtype.filter(|dtype| storage::dtype_named(dtype) != Some(tensor.dtype)) {
                return Err(self.unlike(name, place, storage::dtype_name(tensor.dtype), listed));
            }
            parts.push(TensorPart { file: place.file, offset, tensor });
        }
        TiledTensor::new(shape.clone(), shape, parts, maps)
            .map_err(|why| self.damaged(format!("the parts of tensor `{name}` {why}")))
    }

    /// Returns the dtype of a tensor in the list of contents, such as `float32`.
    fn listed_dtype(&self, id: NodeId) -> Option<&str> {
        let pickle = self.pickle();
        // The properties are pickled as a tuple that begins with the dtype.
        let state = pickle.items(pickle.state(pickle.attribute(id, "properties")?)?)?;
        pickle.class(*state.first()?)?.strip_prefix("torch.")
    }

    /// Returns the error for a part that is not what the list of contents says.
    fn unlike(&self, name: &str, place: &StoragePlace<'_>, found: &str, listed: &str) -> Error {
        let why = format!(
            "a part of tensor `{name}` is {found}, but {listed} in {METADATA}: the files are of different saves; \
             copy all files of one save, or save again"
        );
        Error::unexpected(&self.folder.join(place.path), why)
    }

    /// Returns true for a tensor whose shape in the files Megatron changed.
    fn is_reshaped(&self, name: &str) -> bool {
        let pickle = self.pickle();
        let data = pickle.attribute(pickle.root(), "mcore_data").and_then(|data| pickle.get(data, name));
        data.is_some_and(|data| pickle.get(data, "nd_reformulated_orig_global_shape").is_some())
    }

    /// Reads the archive of one rectangle.
    fn part(&self, name: &str, place: &StoragePlace<'_>, map: &Mapping) -> Result<PickledTensor> {
        let path = &self.file.path;
        let mut memory = MemoryBudget::new(PART_MEMORY);
        let archive = &map[place.start..place.end];
        let (pickle, storages) = parse_archive(path, archive, &mut memory, PART_MEMORY)?;
        let storage = |key: &str| storages.get(key).cloned();
        let read = TensorReader { file: archive, pickle: &pickle, place: &storage }.read(pickle.root());
        read.map(|tensor| tensor.moved(place.start)).map_err(|error| match error {
            NotRead::Other => self.damaged(format!("a part of `{name}` is not a tensor")),
            NotRead::Damaged(why) => self.damaged(format!("a part of tensor `{name}`: {why}")),
            NotRead::Kind(kind) => Error::unexpected(path, format!("`{name}` is a tensor that is not read (`{kind}`)")),
        })
    }
}
