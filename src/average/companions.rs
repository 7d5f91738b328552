//! The small files that belong to a model: its configuration, its tokenizer, its templates.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::json;
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

/// A small file: its path in the model's folder, and what is in it.
pub(super) type Companion = (PathBuf, Vec<u8>);

/// Reads what belongs to a model from its folder; where `dtype` is given, the configuration tells of it.
///
/// # Errors
/// [`Error::Io`], and [`Error::Damaged`] for a configuration that is no JSON where it must be changed.
pub(super) fn read(from: &Path, dtype: Option<Dtype>) -> Result<Vec<Companion>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(from).map_err(Error::io("list", from))? {
        let path = entry.map_err(Error::io("list", from))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if !belongs(name) || !path.is_file() {
            continue;
        }
        let mut bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        if let Some(dtype) = dtype.filter(|_| name == CONFIG) {
            json::read(&path)?;
            bytes = with_dtype(&bytes, dtype);
        }
        found.push((name.into(), bytes));
    }
    Ok(found)
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

/// The configuration with another dtype, and every other byte as it was: those of models of several parts tell it for each.
fn with_dtype(bytes: &[u8], dtype: Dtype) -> Vec<u8> {
    let (mut written, mut at) = (Vec::with_capacity(bytes.len()), 0);
    for pair in json::strings(bytes).windows(2) {
        let (key, value) = (&pair[0], &pair[1]);
        let key_is = |own: &&str| &bytes[key.clone()] == format!("\"{own}\"").as_bytes();
        if DTYPE.iter().any(key_is) && bytes[key.end..value.start].trim_ascii() == b":" {
            written.extend_from_slice(&bytes[at..value.start]);
            written.extend(format!("\"{}\"", torch_name(dtype)).into_bytes());
            at = value.end;
        }
    }
    written.extend_from_slice(&bytes[at..]);
    written
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
        let config = r#"{"torch_dtype" : "float32", "eps": 1e-05, "text": {"dtype":"float32", "n": 18446744073709551615},
            "time_step_limit": [0.0, Infinity], "names": ["dtype", "float64"], "dtype_of_x": "float64", "dtype": null,
            "x": "\"dtype\": \"float64\"", "y": "dtype"}"#;
        let written = with_dtype(config.as_bytes(), Dtype::BF16);
        assert_eq!(String::from_utf8(written).unwrap(), config.replace("float32", "bfloat16"));
    }
}
