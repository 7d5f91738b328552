//! The small files that belong to a model: its configuration, its tokenizer, its templates.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::snapshot::AtomicFile;

/// The configuration that tells the model's dtype.
const CONFIG: &str = "config.json";

/// Where it tells so, by age.
const DTYPE: [&str; 2] = ["torch_dtype", "dtype"];

/// How the names of JSON files begin that belong to a model.
const JSON: [&str; 15] = [
    "config",
    "generation_config",
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "preprocessor_config",
    "processor_config",
    "image_processor",
    "video_preprocessor_config",
    "feature_extractor",
    "chat_template",
    "adapter_config",
    "modules",
    "sentence_bert_config",
];

/// How the names of Python files begin that a model of its own kind is loaded with; they are copied and never run.
const CODE: [&str; 5] = ["configuration_", "modeling_", "tokenization_", "processing_", "image_processing_"];

/// Whether a file belongs to the model, and not to its weights or the state of its training.
pub(super) fn belongs(name: &str) -> bool {
    let begins = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("json") => begins(&JSON) && !name.ends_with(".index.json"),
        Some("txt") => begins(&["vocab", "merges", "sentencepiece"]),
        Some("py") => begins(&CODE),
        Some("model" | "tiktoken" | "jinja" | "bpe" | "spm") => true,
        _ => false,
    }
}

/// Copies what belongs to a model from one folder to another; where `dtype` is given, the configuration tells of it.
///
/// # Errors
/// [`Error::Io`], and [`Error::Damaged`] for a configuration that is no JSON where it must be changed.
pub(super) fn copy(to: &Path, from: &Path, dtype: Option<Dtype>) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Error::io("list", from))? {
        let path = entry.map_err(Error::io("list", from))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if !belongs(name) || !path.is_file() {
            continue;
        }
        let mut bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        if let Some(dtype) = dtype.filter(|_| name == CONFIG) {
            bytes = with_dtype(&path, &bytes, dtype)?;
        }
        write(&to.join(name), &bytes)?;
    }
    Ok(())
}

/// Writes a small file.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = AtomicFile::create(path)?;
    file.write_at(0, bytes)?;
    file.commit()
}

/// The configuration with another dtype, and with all else that it had.
fn with_dtype(path: &Path, bytes: &[u8], dtype: Dtype) -> Result<Vec<u8>> {
    let mut config: Value = serde_json::from_slice(bytes).map_err(|error| Error::damaged(path, error))?;
    set_dtype(&mut config, torch_name(dtype));
    Ok(format!("{config:#}\n").into_bytes())
}

/// Models of several parts have a configuration for each.
fn set_dtype(config: &mut Value, name: &str) {
    let Value::Object(entries) = config else { return };
    for (key, value) in entries {
        match value {
            Value::String(text) if DTYPE.contains(&key.as_str()) => *text = name.to_owned(),
            _ => set_dtype(value, name),
        }
    }
}

fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F64 => "float64",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_a_model() {
        for name in
            ["config.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"]
        {
            assert!(belongs(name), "{name}");
        }
        for name in [
            "model.safetensors.index.json",
            "trainer_state.json",
            "optimizer.pt",
            "training_args.bin",
            "README.md",
            "notes.txt",
            "train.py",
        ] {
            assert!(!belongs(name), "{name}");
        }
    }

    #[test]
    fn a_configuration_tells_of_another_dtype_and_keeps_all_else() {
        let config = r#"{"torch_dtype": "float32", "rms_norm_eps": 1e-05, "text_config": {"dtype": "float32", "n": 18446744073709551615}}"#;
        let written = with_dtype(Path::new("config.json"), config.as_bytes(), Dtype::BF16).unwrap();
        let (was, is): (Value, Value) = (
            serde_json::from_str(&config.replace("float32", "bfloat16")).unwrap(),
            serde_json::from_slice(&written).unwrap(),
        );
        assert_eq!(is, was);
    }
}
