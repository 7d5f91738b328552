//! Shards by size, and their names, as transformers and diffusers write them.

use super::form::OutputForm;
use crate::checkpoint::{CheckpointModel, file_name, is_usual_name, safetensors_name, without_extension};
use crate::error::{Error, Result};
use crate::snapshot::INDEX_SUFFIX;
use crate::synthesis::{ShardTensor, SourceSet};

/// Name of weights without extension, for a folder that is not made after another.
const MODEL: &str = "model";

/// Names of adapters, which their libraries read from one file only.
const SINGLE_FILES: [&str; 2] = ["adapter_model", "pytorch_lora_weights"];

/// Names of a model's own files.
pub(super) struct ShardNames {
    /// Name of each file.
    pub files: Vec<String>,
    /// Name of the index; `None` for a single file.
    pub index: Option<String>,
}

impl ShardNames {
    /// Names `count` files, after those of an example.
    ///
    /// # Errors
    /// [`Error::Setting`] for several files of an adapter.
    pub(super) fn new(example: Option<&CheckpointModel>, count: usize) -> Result<ShardNames> {
        let stem = example.map_or(MODEL.to_owned(), |example| stem(&file_name(&example.found.files[0])));
        if count == 1 {
            return Ok(ShardNames { files: vec![format!("{stem}.safetensors")], index: None });
        }
        if SINGLE_FILES.contains(&stem.as_str()) {
            let reason = format!("an adapter is read from one file, {stem}.safetensors: do not split it");
            return Err(Error::Setting { option: "shard_size", reason });
        }
        let files = (1..=count).map(|i| format!("{stem}-{i:05}-of-{count:05}.safetensors")).collect();
        // A variant stands before the index's extension: model.safetensors.index.fp16.json.
        let index = match stem.split_once('.').filter(|(name, _)| is_usual_name(name)) {
            Some((name, variant)) => format!("{name}.safetensors.index.{variant}.json"),
            None => format!("{stem}.safetensors{INDEX_SUFFIX}"),
        };
        Ok(ShardNames { files, index: Some(index) })
    }
}

/// Returns the name of a model's weights without extension and number: `model.fp16` of
/// `model.fp16-00001-of-00002.safetensors`.
fn stem(file: &str) -> String {
    let name = safetensors_name(file);
    let name = without_extension(&name);
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = name.rsplit_once("-of-").filter(|(_, count)| is_number(count));
    let plain = plain.and_then(|(rest, _)| rest.rsplit_once('-')).filter(|(_, number)| is_number(number));
    plain.map_or(name, |(stem, _)| stem).to_owned()
}

/// Splits tensors into shards of at most the form's size, as far as single tensors fit.
pub(super) fn split(set: &SourceSet<'_>, form: &OutputForm, tensors: Vec<ShardTensor>) -> Vec<Vec<ShardTensor>> {
    let limit = form.shard_size.unwrap_or(u64::MAX);
    let mut shards = vec![Vec::new()];
    let mut size = 0;
    for tensor in tensors {
        // The layout checks that it does not overflow.
        let elements: u64 = set.tensors[tensor.tensor].shape.iter().map(|&extent| extent as u64).product();
        let bytes = elements.saturating_mul(tensor.dtype.bitsize() as u64) / 8;
        if size + bytes > limit && size > 0 {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        let last = shards.len() - 1;
        shards[last].push(tensor);
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stems_are_without_number_and_extension() {
        for (file, expected) in [
            ("model.safetensors", "model"),
            ("model-00001-of-00002.safetensors", "model"),
            ("model.fp16-00001-of-00002.safetensors", "model.fp16"),
            ("pytorch_model-00001-of-00002.bin", "model"),
            ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16"),
            ("a-of-b.safetensors", "a-of-b"),
            ("step-1-of-2.safetensors", "step"),
        ] {
            assert_eq!(stem(file), expected);
        }
    }
}
