//! The scales of low-rank adapters: their factors can be averaged only where these are the same.

use std::collections::BTreeMap;

use serde_json::Value;

use super::find::Input;
use super::json;
use super::model::{Held, Model};
use crate::error::{Error, Result};

/// What PEFT keeps beside an adapter, and its entries that make the scale.
const CONFIG: &str = "adapter_config.json";
const SCALES: [&str; 5] = ["lora_alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora"];

/// How the names of factors begin, as kohya's scripts and LyCORIS have them.
const FACTORS: [&str; 3] = ["lora_", "hada_", "lokr_"];

/// Whether a tensor is the scale of an adapter, if it lies beside the adapter's factors: a single number called `alpha`.
pub(super) fn may_be_scale(name: &str, shape: &[usize]) -> bool {
    prefix(name).is_some() && shape.iter().all(|&extent| extent == 1)
}

/// Whether a tensor is the scale of an adapter.
pub(super) fn is_scale(tensors: &BTreeMap<String, Held>, name: &str) -> bool {
    let Some(prefix) = prefix(name) else { return false };
    let beside = |factor: &str| {
        let start = format!("{prefix}{factor}");
        tensors.range(start.clone()..).next().is_some_and(|(name, _)| name.starts_with(&start))
    };
    tensors.get(name).is_some_and(|held| may_be_scale(name, &held.shape)) && FACTORS.iter().any(|own| beside(own))
}

/// What stands before `alpha` in a name.
fn prefix(name: &str) -> Option<&str> {
    name.strip_suffix("alpha").filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
}

/// Checks that two checkpoints have adapters of the same scales.
///
/// # Errors
/// [`Error::Unexpected`] with both files, and [`Error::Io`] and [`Error::Damaged`] for files that cannot be read.
pub(super) fn check_scales(model: &Model, other: &Model) -> Result<()> {
    for name in model.tensors.keys().filter(|name| is_scale(&model.tensors, name)) {
        if model.scale(name) != other.scale(name) {
            let why = format!(
                "`{name}`, the scale of a low-rank adapter, is another than in {}: {REMEDY}",
                other.input.path.display()
            );
            return Err(Error::unexpected(&model.input.path, why));
        }
    }
    check_configs(&model.input, &other.input)
}

const REMEDY: &str = "adapters of different scales cannot be averaged factor by factor; leave one of the two out";

fn check_configs(input: &Input, other: &Input) -> Result<()> {
    let (Some(path), Some(other)) = (input.beside(CONFIG), other.beside(CONFIG)) else { return Ok(()) };
    let (Some(own), Some(its)) = (json::read(&path)?, json::read(&other)?) else { return Ok(()) };
    match SCALES.iter().find(|key| plain(&own[**key]) != plain(&its[**key])) {
        Some(key) => {
            let (own, its) = (&own[*key], &its[*key]);
            let why = format!("`{key}` is {own}, and {its} in {}: {REMEDY}", other.display());
            Err(Error::unexpected(&path, why))
        }
        None => Ok(()),
    }
}

/// A setting as it can be compared: one that is off or empty is as good as none, and 16 is 16.0.
fn plain(value: &Value) -> Value {
    match value {
        Value::Bool(false) => Value::Null,
        Value::Object(entries) if entries.is_empty() => Value::Null,
        Value::Object(entries) => entries.iter().map(|(key, value)| (key.clone(), plain(value))).collect(),
        Value::Number(number) => number.as_f64().map_or(value.clone(), Value::from),
        _ => value.clone(),
    }
}
