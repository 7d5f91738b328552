//! Small files that belong to a model: its configuration, its tokenizer, its templates.

use std::fs::{self, Permissions};
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use super::find::is_weights;
use super::json;
use super::links::CopySource;
use crate::error::{Error, Result};
use crate::fs::{AtomicFile, check_regular, read_document};
use crate::snapshot::INDEX_SUFFIX;

/// Configuration with the model's dtype.
const CONFIG: &str = "config.json";

/// Keys of the dtype in the configuration, the older one first.
const DTYPE_KEYS: [&str; 2] = ["torch_dtype", "dtype"];

/// List of the modules of sentence-transformers, with the folder of each.
const MODULES: &str = "modules.json";

/// Prefixes of the names of JSON files that belong to a model.
const JSON_PREFIXES: [&str; 18] = [
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

/// Prefixes of the names of Python files that define a model of its own kind. They are copied and never run.
const CODE_PREFIXES: [&str; 5] = ["configuration_", "modeling_", "tokenization_", "processing_", "image_processing_"];

/// Prefixes of the names of text files that belong to a model.
const TEXT_PREFIXES: [&str; 3] = ["vocab", "merges", "sentencepiece"];

/// Small file that belongs to a model.
pub(super) struct AuxiliaryFile {
    /// Path in the model's folder.
    path: PathBuf,
    bytes: Vec<u8>,
    /// Permissions of the file that it was read from.
    permissions: Permissions,
}

impl AuxiliaryFile {
    /// Reads a file, which is at `path` in the model's folder.
    fn read(source: &CopySource, file: &Path, path: PathBuf) -> Result<AuxiliaryFile> {
        let place = source.resolve(file)?;
        let permissions = check_regular(&place)?.permissions();
        Ok(AuxiliaryFile { path, bytes: read_document(&place)?, permissions })
    }
}

/// Returns true if a file belongs to the model, but neither to its weights nor to the state of its training.
fn is_auxiliary(name: &str) -> bool {
    let starts_with_any = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("json") => starts_with_any(&JSON_PREFIXES) && !name.ends_with(INDEX_SUFFIX),
        Some("txt") => starts_with_any(&TEXT_PREFIXES),
        Some("py") => starts_with_any(&CODE_PREFIXES),
        Some("model" | "tiktoken" | "jinja" | "bpe" | "spm") => true,
        // The name may end in a version, as in `tokenizer.model.v3`.
        _ => name.starts_with("tokenizer.model"),
    }
}

/// Reads the auxiliary files from a model's folder. If `dtype` is given, the configuration gets it as the model's
/// dtype. If `follow_links` is true, links may lead out of the folder.
///
/// # Errors
/// [`Error::Io`], [`Error::Damaged`] if a configuration that must be changed is not JSON, and [`Error::Unexpected`] for
/// a link that leads out of the folder.
pub(super) fn read_all(folder: &Path, dtype: Option<Dtype>, follow_links: bool) -> Result<Vec<AuxiliaryFile>> {
    let source = CopySource::new(folder, follow_links)?;
    let mut found = Vec::new();
    for path in files(folder)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| is_auxiliary(name)) else {
            continue;
        };
        let mut file = AuxiliaryFile::read(&source, &path, name.into())?;
        if let Some(dtype) = dtype.filter(|_| name == CONFIG) {
            json::read(&path)?;
            file.bytes = with_dtype(&file.bytes, dtype);
        }
        found.push(file);
    }
    for module in modules(folder)? {
        for path in files(&folder.join(&module))? {
            if path.extension().is_some_and(|extension| extension == "json") {
                let name = path.file_name().unwrap_or_default();
                found.push(AuxiliaryFile::read(&source, &path, module.join(name))?);
            }
        }
    }
    Ok(found)
}

/// Lists the files in a folder, and the links that lead nowhere, so that these are reported when they are read.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if path.is_file() || !path.exists() {
            files.push(path);
        }
    }
    Ok(files)
}

/// Lists the folders of modules without weights, such as `1_Pooling`, relative to the model's folder.
///
/// # Errors
/// [`Error::Io`], and [`Error::Damaged`] if the list of modules is not JSON.
fn modules(dir: &Path) -> Result<Vec<PathBuf>> {
    let Some(Value::Array(modules)) = json::read(&dir.join(MODULES))? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for path in modules.iter().filter_map(|module| module["path"].as_str()).map(PathBuf::from) {
        let inside = path.components().all(|component| matches!(component, Component::Normal(_)));
        if path.as_os_str().is_empty() || !inside || !dir.join(&path).is_dir() {
            continue;
        }
        if !files(&dir.join(&path))?.iter().any(|file| is_weights(file)) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Writes auxiliary files into another folder.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn write_all(folder: &Path, files: &[AuxiliaryFile]) -> Result<()> {
    for file in files {
        let path = folder.join(&file.path);
        let dir = path.parent().unwrap_or(folder);
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        write(&path, &file.bytes, &file.permissions)?;
    }
    Ok(())
}

/// Writes a small file, which nobody may read who may not read the original with these permissions.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn write(path: &Path, bytes: &[u8], permissions: &Permissions) -> Result<()> {
    let file = AtomicFile::create_within(path, permissions)?;
    file.write_at(0, bytes)?;
    file.commit()
}

/// Replaces the dtype in a configuration and keeps every other byte.
///
/// Configurations of models with several parts have it once for each part.
fn with_dtype(bytes: &[u8], dtype: Dtype) -> Vec<u8> {
    let mut written = Vec::with_capacity(bytes.len());
    let mut copied = 0;
    for pair in json::strings(bytes).windows(2) {
        let [key, value] = pair else { continue };
        // The ranges include the quotes.
        let key_name = &bytes[key.start + 1..key.end - 1];
        let is_dtype = DTYPE_KEYS.iter().any(|name| name.as_bytes() == key_name);
        if is_dtype && bytes[key.end..value.start].trim_ascii() == b":" {
            written.extend_from_slice(&bytes[copied..value.start]);
            written.extend(format!("\"{}\"", torch_name(dtype)).into_bytes());
            copied = value.end;
        }
    }
    written.extend_from_slice(&bytes[copied..]);
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
    fn auxiliary_files_are_recognised_by_name() {
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
            assert!(is_auxiliary(name), "{name}");
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
            assert!(!is_auxiliary(name), "{name}");
        }
    }

    #[test]
    fn with_dtype_changes_nothing_else() {
        let config = r#"{"torch_dtype" : "float32", "eps": 1e-05,
            "text": {"dtype":"float32", "n": 18446744073709551615},
            "time_step_limit": [0.0, Infinity], "names": ["dtype", "float64"], "dtype_of_x": "float64", "dtype": null,
            "x": "\"dtype\": \"float64\"", "y": "dtype"}"#;
        let written = with_dtype(config.as_bytes(), Dtype::BF16);
        assert_eq!(String::from_utf8(written).unwrap(), config.replace("float32", "bfloat16"));
    }
}
