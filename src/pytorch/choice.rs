//! Choice of the model among the entries of a training checkpoint.

use super::module::is_module;
use super::pickle::{NodeId, Pickle};
use super::tensor::is_tensor;
use crate::error::listed;

/// Keys under which training checkpoints store the model, and under which they store an average of it.
const MODEL_KEYS: [&str; 10] = [
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params",
    "model_state",
    "net",
    "network",
    "weights",
    "generator",
];
const AVERAGE_KEYS: [&str; 8] =
    ["state_dict_ema", "ema_state_dict", "params_ema", "model_ema", "ema_model", "net_ema", "ema", "averaged_model"];

/// Parts of the keys of entries that hold the state of a training.
const TRAINING_PARTS: [&str; 9] =
    ["optim", "sched", "scaler", "rng", "random", "callback", "dataloader", "train_state", "trainer"];

/// Model of a checkpoint.
#[derive(Debug, PartialEq)]
pub(super) struct Choice {
    /// Dict of tensors, or a module.
    pub model: NodeId,
    /// Key that leads to it; `None` for the whole file.
    pub key: Option<String>,
    /// Keys of other entries that hold weights.
    pub others: Vec<String>,
}

/// Finds the model, by its key if one is given: the key of an entry, or keys that lead to it, joined by dots.
///
/// # Errors
/// The reason why the model is not found, or not one alone.
pub(super) fn choose(pickle: &Pickle, key: Option<&str>) -> Result<Choice, String> {
    let root = pickle.root();
    if let Some(key) = key {
        let model = follow(pickle, root, key).ok_or_else(|| {
            format!("it has no entry `{key}`: --key (`key`) must be one of {}", listed(&keys(pickle, root)))
        })?;
        if !holds_model(pickle, model) {
            return Err(format!("its entry `{key}` holds no weights"));
        }
        return Ok(Choice { model, key: Some(key.to_owned()), others: Vec::new() });
    }
    if is_module(pickle, root) {
        return Ok(Choice { model: root, key: None, others: Vec::new() });
    }
    let candidates: Vec<(&str, NodeId)> =
        named(pickle, root).filter(|(_, value)| holds_model(pickle, *value)).collect();
    let is_flat = named(pickle, root).any(|(_, value)| is_tensor(pickle, value));
    let of =
        |known: &dyn Fn(&str) -> bool| candidates.iter().filter(|(key, _)| known(key)).copied().collect::<Vec<_>>();
    let models = of(&|key| MODEL_KEYS.contains(&key));
    let averages = of(&|key| AVERAGE_KEYS.contains(&key));
    let others = of(&|key| !is_training_state(key));
    let tiers = if is_flat { vec![models] } else { vec![models, averages, others] };
    match tiers.into_iter().find(|tier| !tier.is_empty()).as_deref() {
        Some([(key, model)]) => {
            let others = candidates.iter().filter(|(other, _)| other != key && !is_training_state(other));
            let others = others.map(|(key, _)| (*key).to_owned()).collect();
            Ok(Choice { model: *model, key: Some((*key).to_owned()), others })
        }
        Some(several) => {
            let keys: Vec<&str> = several.iter().map(|(key, _)| *key).collect();
            Err(format!("{} hold weights: choose one with --key (`key`)", listed(&keys)))
        }
        None if is_flat && candidates.is_empty() => Ok(Choice { model: root, key: None, others: Vec::new() }),
        None if is_flat => {
            let keys: Vec<&str> = candidates.iter().map(|(key, _)| *key).collect();
            Err(format!("tensors are at its top level and in {}: choose these with --key (`key`)", listed(&keys)))
        }
        None => {
            Err(format!("no weights are at its top level or in one of its entries {}", listed(&keys(pickle, root))))
        }
    }
}

/// Returns true for the key of an entry that holds the state of a training.
pub fn is_training_state(key: &str) -> bool {
    let key = key.to_lowercase();
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // Megatron numbers the optimizers that follow each other.
    key.strip_prefix("chained_").is_some_and(is_number) || TRAINING_PARTS.iter().any(|part| key.contains(part))
}

/// Returns true for a key under which training checkpoints store an average of the model.
pub fn is_average(key: &str) -> bool {
    AVERAGE_KEYS.contains(&key)
}

/// Returns true for a dict with a tensor in it, and for a module.
fn holds_model(pickle: &Pickle, id: NodeId) -> bool {
    let has_tensor = |entries: &[(NodeId, NodeId)]| entries.iter().any(|(_, value)| is_tensor(pickle, *value));
    pickle.entries(id).is_some_and(has_tensor) || is_module(pickle, id)
}

/// Returns the keys at the top level of entries that hold weights.
pub(super) fn models(pickle: &Pickle) -> Vec<&str> {
    named(pickle, pickle.root()).filter(|(_, value)| holds_model(pickle, *value)).map(|(key, _)| key).collect()
}

/// Follows a key: that of an entry, or several that are joined by dots.
fn follow(pickle: &Pickle, root: NodeId, key: &str) -> Option<NodeId> {
    if let Some(found) = pickle.get(root, key) {
        return Some(found);
    }
    let dots = key.match_indices('.').map(|(at, _)| at);
    dots.filter_map(|at| follow(pickle, pickle.get(root, &key[..at])?, &key[at + 1..])).next()
}

/// Iterates over the entries of a dict whose keys are texts.
fn named(pickle: &Pickle, dict: NodeId) -> impl Iterator<Item = (&str, NodeId)> {
    let entries = pickle.entries(dict).unwrap_or_default().iter();
    entries.filter_map(|(key, value)| Some((pickle.text(*key)?, *value)))
}

fn keys(pickle: &Pickle, dict: NodeId) -> Vec<&str> {
    named(pickle, dict).map(|(key, _)| key).collect()
}
