//! Checkpoints of PyTorch (`.pt`): dicts of tensors, training checkpoints that hold one, and pickled modules.
//!
//! A pickle is parsed as data. Code that it names is never run, and objects stay opaque. The file is mapped: a tensor
//! is a place in it.

mod archive;
mod choice;
mod deepspeed;
mod distributed;
mod entries;
mod file;
mod file_kind;
mod legacy;
mod module;
mod number;
mod pickle;
mod storage;
mod tensor;
mod tensor_file;
mod tiled;

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use choice::Choice;
pub use choice::{is_average, is_training_state};
pub use deepspeed::DeepSpeedModel;
pub use distributed::DistributedCheckpoint;
pub use entries::is_extra_state;
use entries::{ModelEntries, check_growth, read_entries};
use file::{PickledFile, Storages};
pub use number::{Number, number};
use pickle::{Node, NodeId, Pickle};
use tensor::TensorReader;
pub use tensor_file::{Rectangle, TensorFile};
use tiled::TiledTensor;

use crate::error::{Error, Result};
use crate::tensor::NamePatterns;

/// Opened checkpoint. Its pickle is parsed; the elements of its tensors are in the mapped file.
#[derive(Debug)]
pub struct Checkpoint {
    tensors: TensorFile,
    pickle: Pickle,
    storages: Storages,
    /// Key of the entry that holds the model, if it is not the whole file.
    key: Option<String>,
    /// Keys of other entries that hold weights.
    other_models: Vec<String>,
    left_out: Vec<String>,
    /// Entries of the model that are None.
    nones: Vec<String>,
}

impl Deref for Checkpoint {
    type Target = TensorFile;

    fn deref(&self) -> &TensorFile {
        &self.tensors
    }
}

impl Checkpoint {
    /// Opens a checkpoint and reads the dict at its top level. Values that are not tensors are beside the model.
    ///
    /// # Errors
    /// - [`Error::Io`] if the file cannot be read.
    /// - [`Error::Damaged`] if it is not a complete PyTorch file.
    /// - [`Error::Unexpected`] if it is not a regular file, if an entry is a Python object or a tensor that cannot be
    ///   read, or if its contents would take far more memory than the file.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let file = PickledFile::open(path)?;
        let root = file.pickle.root();
        if file.pickle.entries(root).is_none() {
            return Err(Error::damaged(path, "not a dict of tensors"));
        }
        let whole = Choice { model: root, key: None, others: Vec::new() };
        Checkpoint::new(file, whole, &NamePatterns::default())
    }

    /// Opens a checkpoint for the values beside its models; its tensors are not read.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], less those of entries.
    pub fn open_values(path: &Path) -> Result<Checkpoint> {
        let PickledFile { path, map, pickle, storages } = PickledFile::open(path)?;
        let tensors = TensorFile { path, maps: Arc::new(vec![map]), tensors: Default::default() };
        let (other_models, left_out, nones) = Default::default();
        Ok(Checkpoint { tensors, pickle, storages, key: None, other_models, left_out, nones })
    }

    /// Returns the keys at the top level of entries that hold weights.
    pub fn models(&self) -> Vec<&str> {
        choice::models(&self.pickle)
    }

    /// Opens a model's weights: a dict of tensors or a pickled module, or a training checkpoint that holds either.
    ///
    /// `key` names the entry of a training checkpoint that holds the model: one key, or several that lead to it, joined
    /// by dots. By default it is found by the names that trainers use. Entries of the model that match `leave_out` are
    /// left out, whatever they are.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and [`Error::Unexpected`] if it holds several models or none.
    pub fn open_model(path: &Path, key: Option<&str>, leave_out: &NamePatterns) -> Result<Checkpoint> {
        let file = PickledFile::open(path)?;
        let choice = choice::choose(&file.pickle, key).map_err(|why| Error::unexpected(path, why))?;
        Checkpoint::new(file, choice, leave_out)
    }

    /// Reads the tensors of a model without their elements.
    fn new(file: PickledFile, choice: Choice, leave_out: &NamePatterns) -> Result<Checkpoint> {
        let ModelEntries { tensors, left_out, nones } =
            read_entries(&file, choice.model, choice.key.is_some(), leave_out)?;
        let PickledFile { path, map, pickle, storages } = file;
        let maps = Arc::new(vec![map]);
        let tensors = tensors.into_iter().map(|(name, tensor)| (name, TiledTensor::whole(tensor, 0, &maps))).collect();
        let tensors = TensorFile { path, maps, tensors };
        check_growth(&tensors)?;
        Ok(Checkpoint { tensors, pickle, storages, key: choice.key, other_models: choice.others, left_out, nones })
    }

    /// Key of the entry that holds the model; `None` if its tensors are at the top level.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Keys of other entries that hold weights.
    pub fn other_models(&self) -> &[String] {
        &self.other_models
    }

    /// Names of the model's entries that were left out.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// Names of the model's entries that are None.
    pub fn nones(&self) -> &[String] {
        &self.nones
    }

    /// Names of the entries at the top level that are not tensors, in the order of the file.
    pub fn beside(&self) -> impl Iterator<Item = &str> {
        let entries = self.pickle.entries(self.pickle.root()).unwrap_or_default().iter();
        let others = entries.filter(|(_, value)| !tensor::is_tensor(&self.pickle, *value));
        others.filter_map(|(key, _)| self.pickle.text(*key))
    }

    /// Returns an integer at the top level, or in the dicts that keys lead to. It may be a tensor of one integer.
    pub fn int(&self, keys: &[&str]) -> Option<i64> {
        let id = self.value(keys)?;
        if let Some(value) = self.pickle.int(id) {
            return Some(value);
        }
        let place = |key: &str| self.storages.get(key).cloned();
        let file = &self.tensors.maps[0];
        let tensor = TensorReader { file, pickle: &self.pickle, place: &place }.read(id).ok()?;
        let element = tensor.stored(file).filter(|bytes| bytes.len() == tensor.dtype.bitsize() / 8)?;
        match number(tensor.dtype, element)? {
            Number::Whole(value) => Some(value),
            Number::Rounded(..) => None,
        }
    }

    /// Returns a truth value at the top level, or among the attributes or entries that keys lead to.
    pub fn bool(&self, keys: &[&str]) -> Option<bool> {
        let id = keys.iter().try_fold(self.pickle.root(), |at, key| self.field(at, key))?;
        match self.pickle.node(id) {
            Node::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns a number at the top level, or among the attributes or entries that keys lead to.
    pub fn float(&self, keys: &[&str]) -> Option<f64> {
        self.pickle.float(keys.iter().try_fold(self.pickle.root(), |at, key| self.field(at, key))?)
    }

    /// Returns the names of the attributes or entries of the value of a key.
    pub fn fields(&self, key: &str) -> Vec<&str> {
        let value = self.value(&[key]).and_then(|id| self.pickle.fields(id)).unwrap_or_default();
        value.iter().filter_map(|(name, _)| self.pickle.text(*name)).collect()
    }

    fn field(&self, id: NodeId, name: &str) -> Option<NodeId> {
        let mut fields = self.pickle.fields(id)?.iter().rev();
        fields.find(|(key, _)| self.pickle.text(*key) == Some(name)).map(|(_, value)| *value)
    }

    fn value(&self, keys: &[&str]) -> Option<NodeId> {
        keys.iter().try_fold(self.pickle.root(), |dict, key| self.pickle.get(dict, key))
    }

    /// Returns the tensors, and frees what is beside them.
    pub fn into_tensors(self) -> TensorFile {
        self.tensors
    }
}
