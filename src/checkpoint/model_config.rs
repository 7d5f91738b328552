//! Configurations of models (`config.json` and others). Weights of different models are not averaged, even if their
//! shapes agree.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::find::{FoundCheckpoint, module_folders};
use super::settings::{SettingDifference, difference};
use super::{json, yaml};
use crate::error::{Error, Result, shown};
use crate::tensor::NamePatterns;

/// Configuration of a model, or of one of its modules.
const CONFIG: &str = "config.json";

/// Configurations of models that other libraries write: Mistral's and Meta's, and litgpt's.
const OTHER_CONFIGS: [&str; 2] = ["params.json", "model_config.yaml"];

/// Settings of a training, which has those of the model, too: Lightning's, and ultralytics'. They may be in the folder
/// above the checkpoint's.
const TRAININGS: [&str; 2] = ["hparams.yaml", "args.yaml"];

/// Parts of the keys by which settings of a training describe its model, beside what shapes show.
const OF_MODEL: [&str; 14] = [
    "activation",
    "act_fn",
    "act_layer",
    "hidden_act",
    "rope",
    "theta",
    "head",
    "norm_eps",
    "norm_layer",
    "norm_type",
    "arch",
    "model_type",
    "task",
    "patch",
];

/// Parts of the keys of settings of a training that do not describe its model.
const OF_TRAINING: [&str; 8] = ["lr", "learning", "decay", "path", "dir", "name", "loss", "grad"];

/// Keys of the version of the library that wrote it. Another version may write further settings.
const VERSIONS: [&str; 2] = ["transformers_version", "_diffusers_version"];

/// Settings that do not change what weights mean: of the library and of the training.
const HARMLESS: [&str; 31] = [
    "transformers_version",
    "_diffusers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "auto_map",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "use_cache",
    "use_return_dict",
    "return_dict",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "gradient_checkpointing",
    "use_gradient_checkpointing",
    "initializer_range",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    // Keys of Meta's and litgpt's configurations.
    "max_batch_size",
    "max_seq_len",
    "hf_config",
    // Keys that diffusers' EMAModel adds.
    "optimization_step",
    "cur_decay_value",
];

/// Parts of the keys of further harmless settings: rates of dropout, and numbers of special tokens.
const HARMLESS_PARTS: [&str; 5] = ["dropout", "drop_path", "layerdrop", "_token_id", "_pdrop"];

/// Most letters of a value in a message.
const MOST_LETTERS: usize = 80;

/// Checks that two checkpoints, if they have configurations, are of the same model. Settings that match `ignored` may
/// differ.
///
/// # Errors
/// [`Error::Unexpected`] with both files, the setting and its values; [`Error::Io`] and [`Error::Damaged`] for files
/// that cannot be read.
pub(super) fn check(checkpoint: &FoundCheckpoint, other: &FoundCheckpoint, ignored: &NamePatterns) -> Result<()> {
    let modules = checkpoint.folder.as_deref().map(module_folders).transpose()?.unwrap_or_default();
    let inner = modules.iter().map(|module| module.join(CONFIG));
    let names = std::iter::once(CONFIG).chain(OTHER_CONFIGS).map(PathBuf::from);
    for name in names.chain(inner) {
        let (Some(path), Some(other_path)) = (checkpoint.beside(&name), other.beside(&name)) else { continue };
        let (Some(config), Some(other)) = (read(&path)?, read(&other_path)?) else { continue };
        let same_version = VERSIONS.iter().all(|key| config[key] == other[key]);
        let counts = |key: &str, both: bool| (both || same_version) && !is_harmless(key) && !ignored.contains(key);
        compare((&path, &config), (&other_path, &other), &counts)?;
    }
    for name in TRAININGS {
        let (Some(path), Some(other_path)) = (nearest(checkpoint, name), nearest(other, name)) else { continue };
        let (Some(config), Some(other)) = (read(&path)?, read(&other_path)?) else { continue };
        let counts = |key: &str, _: bool| {
            // A map of settings has any key.
            let is_map = [&config, &other].iter().any(|config| value_at(config, key).is_some_and(Value::is_object));
            (is_map || is_of_model(key)) && !is_harmless(key) && !ignored.contains(key)
        };
        compare((&path, &config), (&other_path, &other), &counts)?;
    }
    Ok(())
}

/// Reads a configuration; `None` for a missing one, and for one that is not a map.
fn read(path: &Path) -> Result<Option<Value>> {
    let is_yaml = path.extension().is_some_and(|extension| extension == "yaml");
    let config = if is_yaml { yaml::read(path)? } else { json::read(path)? };
    Ok(config.filter(Value::is_object))
}

/// Finds the settings of a training beside a checkpoint, or in the folder above.
fn nearest(checkpoint: &FoundCheckpoint, name: &str) -> Option<PathBuf> {
    let path = &checkpoint.path;
    let dir = if checkpoint.folder.is_some() { path } else { path.parent()? };
    [Some(dir), dir.parent()].into_iter().flatten().map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Returns the value that keys, joined by dots, lead to.
fn value_at<'a>(config: &'a Value, key: &str) -> Option<&'a Value> {
    key.split('.').try_fold(config, |config, key| config.get(key))
}

/// Refuses two configurations that differ in a setting that counts.
///
/// # Errors
/// [`Error::Unexpected`] with both files, the setting and its values.
fn compare(
    (path, config): (&Path, &Value),
    (other_path, other): (&Path, &Value),
    counts: &dyn Fn(&str, bool) -> bool,
) -> Result<()> {
    let Some(SettingDifference { key, value, other }) = difference(config, other, counts) else { return Ok(()) };
    let [value, other] = [value, other].map(|value| value.to_string().chars().take(MOST_LETTERS).collect::<String>());
    let why = format!(
        "`{key}` is {value}, but {other} in {}: weights of different models cannot be averaged; if this setting does \
         not matter, allow it with --ignore-config {key} (`ignore_config`)",
        shown(other_path)
    );
    Err(Error::unexpected(path, why))
}

/// Returns true if a setting of a training describes its model.
fn is_of_model(path: &str) -> bool {
    let key = path.rsplit('.').next().unwrap_or(path).to_lowercase();
    let has = |parts: &[&str]| parts.iter().any(|part| key.contains(part));
    has(&OF_MODEL) && !has(&OF_TRAINING)
}

/// Returns true if a setting does not change what the weights mean.
fn is_harmless(path: &str) -> bool {
    let key = path.rsplit('.').next().unwrap_or(path);
    HARMLESS.contains(&key) || HARMLESS_PARTS.iter().any(|part| key.contains(part))
}
