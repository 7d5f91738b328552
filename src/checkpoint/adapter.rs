//! Scales of low-rank adapters. Factors of adapters can be averaged only if their scales are equal.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::find::FoundCheckpoint;
use super::json;
use crate::error::{Error, Result, shown};

/// PEFT's configuration beside an adapter.
const CONFIG: &str = "adapter_config.json";

/// Settings of the configuration that determine the scale.
const SCALE_SETTINGS: [&str; 5] = ["lora_alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora"];

/// Entries of a safetensors file's metadata that determine the scale: of diffusers, and of kohya's scripts.
const SCALE_METADATA: [&str; 3] = ["lora_adapter_metadata", "ss_network_alpha", "ss_network_dim"];

/// Prefixes of the names of factors, as kohya's scripts and LyCORIS write them.
const FACTOR_PREFIXES: [&str; 3] = ["lora_", "hada_", "lokr_"];

/// Remedy for adapters of different scales.
pub(super) const REMEDY: &str =
    "adapters of different scales cannot be averaged factor by factor; leave one of the two out";

/// Returns true if a tensor is a single number called `alpha`: the scale of an adapter, if the adapter's factors are
/// beside it.
pub(super) fn may_be_scale(name: &str, shape: &[usize]) -> bool {
    alpha_prefix(name).is_some() && shape.iter().all(|&extent| extent == 1)
}

/// Returns true if factors of an adapter are beside the tensor called `alpha`.
pub(super) fn has_factors<T>(tensors: &BTreeMap<String, T>, alpha: &str) -> bool {
    let Some(prefix) = alpha_prefix(alpha) else { return false };
    FACTOR_PREFIXES.iter().any(|factor| {
        let start = format!("{prefix}{factor}");
        tensors.range(start.clone()..).next().is_some_and(|(name, _)| name.starts_with(&start))
    })
}

/// Returns the part of a name before `alpha`; `None` for any other name.
fn alpha_prefix(name: &str) -> Option<&str> {
    name.strip_suffix("alpha").filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
}

/// Checks that the configurations of two adapters, if they have any, give the same scale.
///
/// # Errors
/// [`Error::Unexpected`] with both files; [`Error::Io`] and [`Error::Damaged`] for files that cannot be read.
pub(super) fn check_configs(checkpoint: &FoundCheckpoint, other: &FoundCheckpoint) -> Result<()> {
    let (Some(path), Some(other_path)) = (checkpoint.beside(CONFIG), other.beside(CONFIG)) else { return Ok(()) };
    let (Some(config), Some(other)) = (json::read(&path)?, json::read(&other_path)?) else { return Ok(()) };
    for key in SCALE_SETTINGS {
        let value = &config[key];
        let other_value = &other[key];
        if normalize(value) != normalize(other_value) {
            let why = format!("`{key}` is {value}, but {other_value} in {}: {REMEDY}", shown(&other_path));
            return Err(Error::unexpected(&path, why));
        }
    }
    Ok(())
}

/// Checks that the metadata of two adapters, if they have any, give the same scale.
///
/// # Errors
/// [`Error::Unexpected`] with both files.
pub(super) fn check_metadata(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    other_path: &Path,
    other: &BTreeMap<String, String>,
) -> Result<()> {
    for key in SCALE_METADATA {
        let (Some(value), Some(other_value)) = (metadata.get(key), other.get(key)) else { continue };
        if scales(value) != scales(other_value) {
            let why = format!("`{key}` of its metadata differs from that of {}: {REMEDY}", shown(other_path));
            return Err(Error::unexpected(path, why));
        }
    }
    Ok(())
}

/// Returns the settings of the scale in an entry of the metadata: a number, or a configuration as JSON.
///
/// The keys of a configuration for several parts begin with the part, as in `unet.lora_alpha`.
fn scales(text: &str) -> BTreeMap<String, Value> {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|_| text.into());
    let Value::Object(entries) = &value else { return BTreeMap::from([(String::new(), normalize(&value))]) };
    let is_scale = |key: &str| SCALE_SETTINGS.iter().any(|setting| key.rsplit('.').next() == Some(setting));
    let scales = entries.iter().filter(|(key, _)| is_scale(key));
    scales.map(|(key, value)| (key.clone(), normalize(value))).filter(|(_, value)| !value.is_null()).collect()
}

/// Normalizes a setting for comparison: off or empty equals absent, and 16 equals 16.0.
fn normalize(value: &Value) -> Value {
    match value {
        Value::Bool(false) => Value::Null,
        Value::Object(entries) if entries.is_empty() => Value::Null,
        Value::Object(entries) => entries.iter().map(|(key, value)| (key.clone(), normalize(value))).collect(),
        Value::Number(number) => number.as_f64().map_or(value.clone(), Value::from),
        _ => value.clone(),
    }
}
