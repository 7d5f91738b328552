//! Configurations of models (`config.json`). Weights of different models are not averaged, even if their shapes agree.

use std::path::PathBuf;

use super::find::{FoundCheckpoint, module_folders};
use super::json;
use super::settings::{SettingDifference, difference};
use crate::error::{Error, Result, shown};
use crate::tensor::NamePatterns;

/// Configuration of a model, or of one of its modules.
const CONFIG: &str = "config.json";

/// Keys of the version of the library that wrote it. Another version may write further settings.
const VERSIONS: [&str; 2] = ["transformers_version", "_diffusers_version"];

/// Settings that do not change what weights mean: of the library and of the training.
const HARMLESS: [&str; 28] = [
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
    for name in std::iter::once(PathBuf::from(CONFIG)).chain(inner) {
        let (Some(path), Some(other_path)) = (checkpoint.beside(&name), other.beside(&name)) else { continue };
        let (Some(config), Some(other)) = (json::read(&path)?, json::read(&other_path)?) else { continue };
        if !config.is_object() || !other.is_object() {
            continue;
        }
        let same_version = VERSIONS.iter().all(|key| config[key] == other[key]);
        let counts = |key: &str, both: bool| (both || same_version) && !is_harmless(key) && !ignored.contains(key);
        if let Some(SettingDifference { key, value, other }) = difference(&config, &other, &counts) {
            let [value, other] =
                [value, other].map(|value| value.to_string().chars().take(MOST_LETTERS).collect::<String>());
            let why = format!(
                "`{key}` is {value}, but {other} in {}: weights of different models cannot be averaged; if this \
                 setting does not matter, allow it with --ignore-config {key} (`ignore_config`)",
                shown(&other_path)
            );
            return Err(Error::unexpected(&path, why));
        }
    }
    Ok(())
}

/// Returns true if a setting does not change what the weights mean.
fn is_harmless(path: &str) -> bool {
    let key = path.rsplit('.').next().unwrap_or(path);
    HARMLESS.contains(&key) || HARMLESS_PARTS.iter().any(|part| key.contains(part))
}
