//! Files that belong to a model beside its weights: its configuration, its tokenizer, its templates, its code.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::find::{module_folders, split_index};
use super::json;
use super::links::CopySource;
use crate::error::{Error, Result};
use crate::fs::{AtomicFile, check_regular, read_document};

/// Configuration with the model's dtype.
const CONFIG: &str = "config.json";

/// Keys of the dtype in the configuration, the older one first.
const DTYPE_KEYS: [&str; 2] = ["torch_dtype", "dtype"];

/// Bytes of a file that are copied at a time.
const COPY_PIECE: usize = 1 << 20;

/// Beginnings of the names of files that trainers write about a training. Files of arrays are known by their extension.
const TRAINING_STATE: [&str; 4] = ["trainer_state", "training_args", "events.out.tfevents", "zero_to_fp32"];

/// Whole names and endings of such files.
const TRAINING_NAMES: [&str; 1] = ["latest"];
const TRAINING_ENDINGS: [&str; 4] = ["_results.json", ".log", ".lock", ".tmp"];

/// Extensions of files of weights, or of arrays in a training's state.
const ARRAYS: [&str; 19] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "pkl",
    "pickle",
    "tar",
    "h5",
    "msgpack",
    "onnx",
    "gguf",
    "ggml",
    "tflite",
    "npy",
    "npz",
    "distcp",
    "data",
    "pb",
];

/// File that belongs to a model, and is neither weights nor state of the training.
pub(crate) struct AuxiliaryFile {
    /// Path in the model's folder.
    path: PathBuf,
    /// File that it is copied from, without links.
    place: PathBuf,
    /// Contents, if they are not those of that file.
    changed: Option<Vec<u8>>,
    /// Permissions of the file that it was read from.
    permissions: Permissions,
}

impl AuxiliaryFile {
    /// Returns the path in the model's folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that a file can be read, which is at `path` in the model's folder. It may be large, so it is not read
    /// yet.
    fn find(source: &CopySource, file: &Path, path: PathBuf) -> Result<AuxiliaryFile> {
        let place = source.resolve(file)?;
        let permissions = check_regular(&place)?.permissions();
        File::open(&place).map_err(Error::io("read", &place))?;
        Ok(AuxiliaryFile { path, place, changed: None, permissions })
    }
}

/// Returns true if a file belongs to the model, but neither to its weights nor to the state of its training.
///
/// A model may need any file: its configuration, its tokenizer, code of its own. So what does not belong is named.
fn is_auxiliary(name: &str) -> bool {
    let is_state = TRAINING_STATE.iter().any(|prefix| name.starts_with(prefix))
        || TRAINING_NAMES.contains(&name)
        || TRAINING_ENDINGS.iter().any(|ending| name.ends_with(ending));
    let has_arrays = name.rsplit_once('.').is_some_and(|(_, extension)| ARRAYS.contains(&extension));
    !is_state && !has_arrays && split_index(name).is_none() && !name.starts_with('.')
}

/// Finds the auxiliary files of a model's folder. If `dtype` is given, the configuration gets it as the model's
/// dtype. If `follow_links` is true, links may lead out of the folder.
///
/// # Errors
/// [`Error::Io`], [`Error::Damaged`] if a configuration that must be changed is not JSON, and [`Error::Unexpected`] for
/// a link that leads out of the folder.
pub(crate) fn find_all(folder: &Path, dtype: Option<Dtype>, follow_links: bool) -> Result<Vec<AuxiliaryFile>> {
    let source = CopySource::new(folder, follow_links)?;
    let mut found = Vec::new();
    for path in files(folder)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| is_auxiliary(name)) else {
            continue;
        };
        let mut file = AuxiliaryFile::find(&source, &path, name.into())?;
        if let Some(dtype) = dtype.filter(|_| name == CONFIG) {
            json::read(&path)?;
            file.changed = Some(with_dtype(&read_document(&file.place)?, dtype));
        }
        found.push(file);
    }
    for module in module_folders(folder)? {
        for path in files(&folder.join(&module))? {
            let name = path.file_name().unwrap_or_default();
            if name.to_str().is_some_and(is_auxiliary) {
                found.push(AuxiliaryFile::find(&source, &path, module.join(name))?);
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

/// Writes auxiliary files into another folder.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write_all(folder: &Path, files: &[AuxiliaryFile]) -> Result<()> {
    for file in files {
        let path = folder.join(&file.path);
        let dir = path.parent().unwrap_or(folder);
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        match &file.changed {
            Some(bytes) => write(&path, bytes, &file.permissions)?,
            None => copy(&path, &file.place, &file.permissions)?,
        }
    }
    Ok(())
}

/// Copies a file in pieces, since it may be larger than the memory.
fn copy(path: &Path, place: &Path, permissions: &Permissions) -> Result<()> {
    let mut source = File::open(place).map_err(Error::io("read", place))?;
    let file = AtomicFile::create_within(path, permissions)?;
    let mut piece = vec![0; COPY_PIECE];
    let mut at = 0;
    loop {
        let length = source.read(&mut piece).map_err(Error::io("read", place))?;
        if length == 0 {
            return file.commit();
        }
        file.write_at(at, &piece[..length])?;
        at += length as u64;
    }
}

/// Writes a small file, which nobody may read who may not read the original with these permissions.
fn write(path: &Path, bytes: &[u8], permissions: &Permissions) -> Result<()> {
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
            "net.py",
            "layers.py",
            "README.md",
            "model_config.yaml",
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
            "model.safetensors.index.fp16.json",
            "model_1.safetensors",
            "all_results.json",
            "latest",
            "tf_model.h5",
            "scheduler.pt",
            ".gitattributes",
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
