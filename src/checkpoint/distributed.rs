//! Weights of a model in a folder of `torch.distributed.checkpoint`.

use std::collections::BTreeSet;
use std::path::Path;

use super::options::ReadOptions;
use crate::error::{Error, Result, listed};
use crate::pytorch::{DistributedCheckpoint, TensorFile, is_extra_state, is_training_state};

/// Keys under which trainers store the model.
const MODEL_KEYS: [&str; 5] = ["model", "state_dict", "module", "app.model", "app"];

/// Reads the tensors of the model without their elements: those under the key of the options, or under a usual one, or
/// all but the state of the training. Returns them by their names after the key, the key, and what was left out.
///
/// # Errors
/// [`Error::Unexpected`] if there are none, or if an entry of the model is not a tensor; [`Error::Io`] and
/// [`Error::Damaged`].
pub(super) fn read(folder: &Path, options: &ReadOptions) -> Result<(TensorFile, Option<String>, Vec<String>)> {
    let checkpoint = DistributedCheckpoint::open(folder)?;
    let entries = checkpoint.entries()?;
    let key = options.key.clone().or_else(|| {
        let holds_tensors =
            |key: &&str| entries.iter().any(|(name, is_tensor)| *is_tensor && within(name, key).is_some());
        MODEL_KEYS.iter().copied().find(holds_tensors).map(str::to_owned)
    });
    let own_name = |name: &str| match &key {
        Some(key) => within(name, key).map(str::to_owned),
        None => Some(name.to_owned()).filter(|name| !is_training_state(first_key(name))),
    };
    let (left_out, of_model): (Vec<_>, Vec<_>) = entries
        .iter()
        .filter_map(|(name, is_tensor)| Some((own_name(name)?, *is_tensor)))
        .partition(|(name, is_tensor)| options.leave_out.contains(name) || (!is_tensor && is_extra_state(name)));
    let odd: Vec<&String> = of_model.iter().filter(|(_, is_tensor)| !is_tensor).map(|(name, _)| name).collect();
    if key.is_some() && !odd.is_empty() {
        let why =
            format!("{} of the model are not tensors: leave them out with --leave-out (`leave_out`)", listed(&odd));
        return Err(Error::unexpected(folder, why));
    }
    if !of_model.iter().any(|(_, is_tensor)| *is_tensor) {
        let first = entries.iter().map(|(name, _)| first_key(name));
        let keys: Vec<&str> = first.collect::<BTreeSet<_>>().into_iter().collect();
        let why = format!("no weights are in it under this key: --key (`key`) may be one of {}", listed(&keys));
        return Err(Error::unexpected(folder, why));
    }
    let tensors = checkpoint.read(&|name| own_name(name).filter(|name| !options.leave_out.contains(name)))?;
    Ok((tensors, key, left_out.into_iter().map(|(name, _)| name).collect()))
}

/// Returns a name after a key that leads to it.
fn within<'a>(name: &'a str, key: &str) -> Option<&'a str> {
    name.strip_prefix(key)?.strip_prefix('.')
}

/// Returns the first of the keys that lead to an entry.
fn first_key(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}
