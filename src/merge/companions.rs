//! The small files that belong to a model: its configuration, its tokenizer, its templates.

use std::fs;
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use super::find::is_weights;
use super::json;
use crate::error::{Error, Result};
use crate::fs::{AtomicFile, read_document};

/// The configuration that tells the model's dtype.
const CONFIG: &str = "config.json";

/// Where it tells so, by age.
const DTYPE: [&str; 2] = ["torch_dtype", "dtype"];

/// The modules of sentence-transformers, with the folder of each.
const MODULES: &str = "modules.json";

/// How the names of JSON files begin that belong to a model.
const JSON: [&str; 18] = [
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
    "normalizer",
    "params",
    "tekken",
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
        // With a version, as `tokenizer.model.v3`.
        _ => name.starts_with("tokenizer.model"),
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
    for path in files(from)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| belongs(name)) else { continue };
        let mut bytes = read_document(&path)?;
        if let Some(dtype) = dtype.filter(|_| name == CONFIG) {
            json::read(&path)?;
            bytes = with_dtype(&bytes, dtype);
        }
        found.push((name.into(), bytes));
    }
    for module in modules(from)? {
        for path in files(&from.join(&module))?.iter().filter(|path| path.extension().is_some_and(|end| end == "json"))
        {
            let bytes = read_document(path)?;
            found.push((module.join(path.file_name().unwrap_or_default()), bytes));
        }
    }
    Ok(found)
}

/// The files in a folder.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let paths = fs::read_dir(dir).map_err(Error::io("list", dir))?.map(|entry| entry.map(|entry| entry.path()));
    let paths: Vec<PathBuf> = paths.collect::<std::io::Result<_>>().map_err(Error::io("list", dir))?;
    Ok(paths.into_iter().filter(|path| path.is_file()).collect())
}

/// The folders of those modules that are but a configuration, such as `1_Pooling`, relative to the model's.
///
/// # Errors
/// [`Error::Io`], and [`Error::Damaged`] where the list of modules is no JSON.
fn modules(dir: &Path) -> Result<Vec<PathBuf>> {
    let Some(Value::Array(modules)) = json::read(&dir.join(MODULES))? else { return Ok(Vec::new()) };
    let path = |module: &Value| module["path"].as_str().filter(|path| !path.is_empty()).map(PathBuf::from);
    let inside = |path: &PathBuf| path.components().all(|part| matches!(part, Component::Normal(_)));
    let mut found = Vec::new();
    for path in modules.iter().filter_map(path).filter(inside).filter(|path| dir.join(path).is_dir()) {
        if !files(&dir.join(&path))?.iter().any(|file| is_weights(file)) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Writes companions into another folder.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn write_all(to: &Path, companions: &[Companion]) -> Result<()> {
    for (path, bytes) in companions {
        let path = to.join(path);
        let dir = path.parent().unwrap_or(to);
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        write(&path, bytes)?;
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
        for name in [
            "config.json",
            "tokenizer_config.json",
            "vocab.txt",
            "merges.txt",
            "spiece.model",
            "chat_template.jinja",
            "tekken.json",
            "tokenizer.model",
            "tokenizer.model.v3",
            "normalizer.json",
            "params.json",
            "added_tokens.json",
            "modules.json",
        ] {
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
