//! Checkpoints of PyTorch (`.pt`): dicts of tensors, training checkpoints that hold one, and pickled modules.
//!
//! A pickle is parsed as data. Code that it names is never run, and objects stay opaque. The file is mapped: a tensor
//! is a place in it.

mod archive;
mod choice;
mod distributed;
mod file;
mod file_kind;
mod legacy;
mod module;
mod number;
mod pickle;
mod storage;
mod tensor;
mod tensor_file;

use std::collections::{BTreeMap, HashSet};
use std::ops::Deref;
use std::path::Path;

use choice::Choice;
pub use choice::is_training_state;
pub use distributed::DistributedCheckpoint;
use file::{PickledFile, Storages};
pub use number::{Number, number};
use pickle::{MemoryBudget, Node, NodeId, Pickle};
use tensor::{NotRead, TensorReader};
pub use tensor_file::TensorFile;
use tensor_file::TiledTensor;

use crate::error::{Error, Result};
use crate::tensor::NamePatterns;

/// Largest ratio of a file's tensors to its length. It exceeds 1 if tensors share elements.
const MAX_GROWTH: u64 = 4;

/// Bytes of tensors that are allowed whatever the file's length.
const ALWAYS_ALLOWED: u64 = 1 << 20;

/// Bytes that the names of a model's tensors may take.
const NAMES: usize = 64 << 20;

/// Most entries that an error names after the first.
const MOST_REFUSED: usize = 9;

const REMEDY: &str = "leave it out with --leave-out (`leave_out`), or if you trust the file, load it with PyTorch, \
                      remove that entry and save it again";

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
        let mut tensors = BTreeMap::new();
        let mut left_out = Vec::new();
        let mut nones = Vec::new();
        let mut refused = Vec::new();
        for ModelEntry { name, is_text, value: id } in model_entries(&file, choice.model)? {
            if leave_out.contains(&name) {
                left_out.push(name);
                continue;
            }
            match file.with_tensors(|tensors| tensors.read(id)) {
                Ok(_) if !is_text => refused.push(format!("a tensor is at the key {name}, which is not a text")),
                Ok(tensor) => drop(tensors.insert(name, TiledTensor::whole(tensor))),
                Err(NotRead::Damaged(why)) => {
                    return Err(Error::damaged(&file.path, format!("tensor `{name}`: {why}")));
                }
                Err(NotRead::Kind(kind)) => refused.push(format!("`{name}` is a tensor that is not read (`{kind}`)")),
                Err(NotRead::Other) if matches!(file.pickle.node(id), Node::None) => nones.push(name),
                Err(NotRead::Other) => refused.extend(refusal(&file.pickle, choice.key.is_some(), &name, id)),
            }
        }
        check_refused(&file.path, &refused)?;
        let PickledFile { path, map, pickle, storages } = file;
        let tensors = TensorFile { path, maps: vec![map], tensors };
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

    /// Returns a truth value at the top level, or in the dicts that keys lead to.
    pub fn bool(&self, keys: &[&str]) -> Option<bool> {
        match self.pickle.node(self.value(keys)?) {
            Node::Bool(value) => Some(*value),
            _ => None,
        }
    }

    fn value(&self, keys: &[&str]) -> Option<NodeId> {
        keys.iter().try_fold(self.pickle.root(), |dict, key| self.pickle.get(dict, key))
    }

    /// Returns the tensors, and frees what is beside them.
    pub fn into_tensors(self) -> TensorFile {
        self.tensors
    }
}

/// Entry of a model.
struct ModelEntry {
    /// Key, as a text.
    name: String,
    /// False for a key that is neither a text nor a whole number, so that no tensor can be called by it.
    is_text: bool,
    value: NodeId,
}

/// Lists the entries of a model by their names, in its order. Of equal names, the last counts.
fn model_entries(file: &PickledFile, model: NodeId) -> Result<Vec<ModelEntry>> {
    let pickle = &file.pickle;
    if module::is_module(pickle, model) {
        let entries = module::state_dict(pickle, model, &mut MemoryBudget::new(NAMES));
        let entries = entries.map_err(|_| Error::unexpected(&file.path, "its modules hold each other"))?;
        let entry = |(name, value)| ModelEntry { name, is_text: true, value };
        return Ok(entries.into_iter().map(entry).collect());
    }
    let mut entries = Vec::new();
    for &(key, value) in pickle.entries(model).unwrap_or_default() {
        let is_text = matches!(pickle.node(key), Node::Text(_) | Node::Int(_));
        entries.push(ModelEntry { name: key_text(pickle, key), is_text, value });
    }
    Ok(entries)
}

/// Returns a key as Python prints it, or its kind.
fn key_text(pickle: &Pickle, key: NodeId) -> String {
    match pickle.node(key) {
        Node::Text(name) => name.to_string(),
        Node::Int(number) => number.to_string(),
        Node::Bool(true) => "True".to_owned(),
        Node::Bool(false) => "False".to_owned(),
        Node::None => "None".to_owned(),
        Node::Number => "(a number)".to_owned(),
        Node::Tuple(_) => "(a tuple)".to_owned(),
        Node::Bytes(_) => "(bytes)".to_owned(),
        _ => "(an object)".to_owned(),
    }
}

/// Explains why an entry that is not a tensor cannot be left aside; `None` if it can.
///
/// Plain values may be beside tensors at the top level, but not in the dict of a model.
fn refusal(pickle: &Pickle, is_model: bool, name: &str, id: NodeId) -> Option<String> {
    match pickle.node(id) {
        Node::Object(_) | Node::Class(_) | Node::Persistent(_) => {
            let kind = pickle.call(id).map(|(class, _)| class).or(pickle.class(id)).unwrap_or("a storage");
            Some(format!("`{name}` is a Python object (`{kind}`), whose code is never run"))
        }
        _ if !is_model => None,
        _ => Some(format!("`{name}` is not a tensor")),
    }
}

/// Returns the error for the entries that cannot be read, in the order of the file.
fn check_refused(path: &Path, refused: &[String]) -> Result<()> {
    let Some((first, rest)) = refused.split_first() else { return Ok(()) };
    let shown: String = rest.iter().take(MOST_REFUSED).map(|why| format!("; {why}")).collect();
    let more = match rest.len().saturating_sub(MOST_REFUSED) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    Err(Error::unexpected(path, format!("{first}{shown}{more}: {REMEDY}")))
}

/// Refuses tensors that repeat few elements many times.
fn check_growth(file: &TensorFile) -> Result<()> {
    // Tied tensors are the same elements under several names.
    let mut places = HashSet::new();
    let all = file.tensors.values().flat_map(|tensor| &tensor.parts).map(|part| &part.tensor);
    let distinct = all.filter(|tensor| places.insert(tensor.place()));
    let sizes = distinct.map(|tensor| tensor.bytes().map_or(u64::MAX, |bytes| bytes as u64));
    let bytes = sizes.fold(0, u64::saturating_add);
    let length = file.maps.iter().map(|map| map.len() as u64).sum::<u64>();
    if bytes > length.saturating_mul(MAX_GROWTH).saturating_add(ALWAYS_ALLOWED) {
        let why = format!(
            "its tensors take {bytes} bytes and the file only {length}, so they repeat few elements: if you trust \
             the file, load it with PyTorch, make them contiguous and save it again"
        );
        return Err(Error::unexpected(&file.path, why));
    }
    Ok(())
}
