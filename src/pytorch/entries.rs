//! Entries of a model in a pickle: its tensors, and what cannot be read.

use std::collections::HashSet;
use std::path::Path;

use super::file::PickledFile;
use super::module;
use super::pickle::{MemoryBudget, Node, NodeId, Pickle};
use super::tensor::{NotRead, PickledTensor};
use super::tensor_file::TensorFile;
use super::tiled::TiledTensor;
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

/// Tensors of a model, in its order, and the names of other entries.
pub(super) struct ModelEntries {
    pub tensors: Vec<(String, PickledTensor)>,
    pub left_out: Vec<String>,
    /// Entries that are None.
    pub nones: Vec<String>,
}

/// Reads the tensors of a model without their elements. `is_model` is true if nothing but tensors may be in it.
///
/// # Errors
/// [`Error::Damaged`], and [`Error::Unexpected`] with all entries that cannot be read.
pub(super) fn read_entries(
    file: &PickledFile,
    model: NodeId,
    is_model: bool,
    leave_out: &NamePatterns,
) -> Result<ModelEntries> {
    let mut tensors = Vec::new();
    let mut left_out = Vec::new();
    let mut nones = Vec::new();
    let mut refused = Vec::new();
    for ModelEntry { name, is_text, value: id } in model_entries(file, model)? {
        if leave_out.contains(&name) {
            left_out.push(name);
            continue;
        }
        match file.with_tensors(|tensors| tensors.read(id)) {
            Ok(_) if !is_text => refused.push(format!("a tensor is at the key {name}, which is not a text")),
            Ok(tensor) => tensors.push((name, tensor)),
            Err(NotRead::Damaged(why)) => {
                return Err(Error::damaged(&file.path, format!("tensor `{name}`: {why}")));
            }
            Err(NotRead::Kind(kind)) => refused.push(format!("`{name}` is a tensor that is not read (`{kind}`)")),
            Err(NotRead::Other) if file.pickle.is_none(id) => nones.push(name),
            Err(NotRead::Other) if is_extra_state(&name) => left_out.push(name),
            Err(NotRead::Other) => refused.extend(refusal(&file.pickle, is_model, &name, id)),
        }
    }
    check_refused(&file.path, &refused)?;
    Ok(ModelEntries { tensors, left_out, nones })
}

/// Returns true for an entry in which a module keeps objects of its own beside its tensors. Megatron numbers its parts,
/// as in `_extra_state/shard_0_2`.
pub fn is_extra_state(name: &str) -> bool {
    let name = name.split('/').next().unwrap_or(name);
    name.rsplit('.').next() == Some("_extra_state")
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
        Node::Number | Node::Float(_) => "(a number)".to_owned(),
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
pub(super) fn check_growth(file: &TensorFile) -> Result<()> {
    // Tied tensors are the same elements under several names.
    let mut places = HashSet::new();
    let all = file.tensors.values().flat_map(TiledTensor::parts);
    let distinct = all.filter(|part| places.insert((part.file, part.tensor.place())));
    let sizes = distinct.map(|part| part.tensor.bytes().map_or(u64::MAX, |bytes| bytes as u64));
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
