//! Scales of low-rank adapters. Factors of adapters can be averaged only if their scales are equal.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::find::FoundCheckpoint;
use super::json;
use super::options::AdapterProduct;
use super::settings::{SettingDifference, difference, normalize};
use crate::error::{Error, Result, shown};

/// PEFT's configuration beside an adapter.
const CONFIG: &str = "adapter_config.json";

/// Settings of the configuration that determine the scale. `alpha` is that of LoHa and LoKr.
const SCALE_SETTINGS: [&str; 6] = ["lora_alpha", "alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora"];

/// The setting by which products of factors are scaled.
const ALPHA: &str = SCALE_SETTINGS[0];

/// Settings of the configuration that do not change what the factors mean: of the training, and names of modules,
/// which the tensors have too.
const HARMLESS: [&str; 20] = [
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "task_type",
    "inference_mode",
    "init_lora_weights",
    "init_weights",
    "lora_dropout",
    "module_dropout",
    "rank_dropout",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "megatron_core",
    "runtime_config",
];

/// Entries of a safetensors file's metadata that determine the scale: of diffusers, and of kohya's scripts.
const DIFFUSERS_METADATA: &str = "lora_adapter_metadata";
const KOHYA_ALPHA: &str = "ss_network_alpha";
const KOHYA_DIM: &str = "ss_network_dim";

/// Prefixes of the names of factors: of PEFT and kohya's scripts, of diffusers, and of LyCORIS.
const FACTOR_PREFIXES: [&str; 5] = ["lora_", "lora.", "hada_", "lokr_", "oft_"];

/// Names of factors after a part that ends in `lora`, as older versions of diffusers have them.
const FACTORS_OF_LORA: [&str; 2] = ["down.", "up."];

/// Remedy for adapters of different scales.
pub(super) const REMEDY: &str = "adapters of different scales cannot be averaged factor by factor: average their \
                                 products with --product svd (`product`), or leave one of the two out";

/// Remedy for adapters that differ in something else.
const REMEDY_OTHER: &str = "such adapters cannot be averaged: leave one of the two out";

/// Returns true if a tensor is a single number called `alpha`: the scale of an adapter, if the adapter's factors are
/// beside it.
pub(super) fn may_be_scale(name: &str, shape: &[usize]) -> bool {
    alpha_prefix(name).is_some() && shape.iter().all(|&extent| extent == 1)
}

/// Returns true if factors of an adapter are beside the tensor called `alpha`.
pub(super) fn has_factors<T>(tensors: &BTreeMap<String, T>, alpha: &str) -> bool {
    let Some(prefix) = alpha_prefix(alpha) else { return false };
    let has = |factor: &&str| {
        let start = format!("{prefix}{factor}");
        tensors.range(start.clone()..).next().is_some_and(|(name, _)| name.starts_with(&start))
    };
    FACTOR_PREFIXES.iter().any(has) || (prefix.ends_with("lora.") && FACTORS_OF_LORA.iter().any(has))
}

/// Returns the part of a name before `alpha`; `None` for any other name.
fn alpha_prefix(name: &str) -> Option<&str> {
    name.strip_suffix("alpha").filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
}

/// Checks that the configurations of two adapters, if they have any, are alike and give the same scale. Products may
/// have different values of `lora_alpha`.
///
/// # Errors
/// [`Error::Unexpected`] with both files; [`Error::Io`] and [`Error::Damaged`] for files that cannot be read.
pub(super) fn check_configs(
    checkpoint: &FoundCheckpoint,
    other: &FoundCheckpoint,
    product: AdapterProduct,
) -> Result<()> {
    let (Some(path), Some(other_path)) = (checkpoint.beside(CONFIG), other.beside(CONFIG)) else { return Ok(()) };
    let (Some(config), Some(other)) = (json::read(&path)?, json::read(&other_path)?) else { return Ok(()) };
    let has_pattern = !normalize(&config["alpha_pattern"]).is_null();
    let counts = |key: &str, both: bool| match key {
        ALPHA => product == AdapterProduct::Factors || has_pattern,
        key if is_scale(key.split('.').next().unwrap_or(key)) => true,
        key => both && !HARMLESS.contains(&key),
    };
    let Some(SettingDifference { key, value, other }) = difference(&config, &other, &counts) else { return Ok(()) };
    let is_ratio = key == ALPHA && !has_pattern;
    let remedy = if is_ratio { REMEDY } else { REMEDY_OTHER };
    Err(Error::unexpected(&path, format!("`{key}` is {value}, but {other} in {}: {remedy}", shown(&other_path))))
}

fn is_scale(key: &str) -> bool {
    SCALE_SETTINGS.contains(&key)
}

/// Checks that the metadata of two adapters, if they have any, give the same scale. Products may have different values
/// of `lora_alpha`, and of kohya's alpha, which is also in the tensors.
///
/// # Errors
/// [`Error::Unexpected`] with both files.
pub(super) fn check_metadata(
    (path, metadata): (&Path, &BTreeMap<String, String>),
    (other_path, other): (&Path, &BTreeMap<String, String>),
    product: AdapterProduct,
) -> Result<()> {
    for key in [DIFFUSERS_METADATA, KOHYA_ALPHA, KOHYA_DIM] {
        let (Some(value), Some(other_value)) = (metadata.get(key), other.get(key)) else { continue };
        let [mut value, mut other_value] = [value, other_value].map(|text| scales(text));
        if product == AdapterProduct::Svd {
            if key == KOHYA_ALPHA {
                continue;
            }
            let is_fixed = |key: &String, _: &mut Value| key.rsplit('.').next() != Some(ALPHA);
            value.retain(is_fixed);
            other_value.retain(is_fixed);
        }
        if value != other_value {
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
    let scales = entries.iter().filter(|(key, _)| key.rsplit('.').next().is_some_and(is_scale));
    scales.map(|(key, value)| (key.clone(), normalize(value))).filter(|(_, value)| !value.is_null()).collect()
}

/// Checks that the configuration of an adapter, if it has one, is of products of two factors.
///
/// # Errors
/// [`Error::Unexpected`] for factors of several experts in one tensor; [`Error::Io`] and [`Error::Damaged`].
pub(super) fn check_products(checkpoint: &FoundCheckpoint) -> Result<()> {
    let Some(path) = checkpoint.beside(CONFIG) else { return Ok(()) };
    let Some(config) = json::read(&path)? else { return Ok(()) };
    if normalize(&config["target_parameters"]).is_null() {
        return Ok(());
    }
    let why = "its `target_parameters` have the factors of all experts in one tensor, whose product is not that of an \
               expert: average the factors without --product svd (`product`)";
    Err(Error::unexpected(&path, why))
}

/// Configurations that may have the scale of an adapter.
pub(super) struct ScaleSources {
    config: Option<Value>,
    metadata: BTreeMap<String, Value>,
}

impl ScaleSources {
    /// Reads the configurations of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Damaged`].
    pub(super) fn new(checkpoint: &FoundCheckpoint, metadata: BTreeMap<String, String>) -> Result<ScaleSources> {
        let config = checkpoint.beside(CONFIG).map(|path| json::read(&path)).transpose()?.flatten();
        let metadata = metadata.get(DIFFUSERS_METADATA).map(|text| scales(text)).unwrap_or_default();
        Ok(ScaleSources { config, metadata })
    }

    /// Returns the value of `lora_alpha` for a factor. In metadata it begins with the part of the model, as its names
    /// do.
    pub(super) fn alpha(&self, factor: &str) -> Option<f64> {
        let of_part = self.metadata.iter().find(|(key, _)| {
            key.strip_suffix(ALPHA)
                .is_some_and(|part| factor.starts_with(part) && (part.is_empty() || part.ends_with('.')))
        });
        let of_config = || self.config.as_ref().and_then(|config| config[ALPHA].as_f64());
        of_part.and_then(|(_, value)| value.as_f64()).or_else(of_config)
    }
}
