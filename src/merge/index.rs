//! The index of a model in shards, by Hugging Face's conventions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::fs::read_document;

/// How the names of indices end.
pub(super) const INDEX: &str = ".index.json";

/// Which shard holds each tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Index {
    /// The index itself.
    pub path: PathBuf,
    /// The file of each tensor, by name.
    pub weight_map: BTreeMap<String, String>,
    metadata: Map<String, Value>,
}

#[derive(Deserialize)]
struct Stored {
    #[serde(default)]
    metadata: Map<String, Value>,
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads an index.
    ///
    /// # Errors
    /// As [`read_document`], and [`Error::Damaged`] where it is none, or names files that do not lie beside it.
    pub(super) fn read(path: &Path) -> Result<Index> {
        let text = read_document(path)?;
        let stored: Stored = serde_json::from_slice(&text).map_err(|error| Error::damaged(path, error))?;
        let Stored { metadata, weight_map } = stored;
        let plain = |file: &str| {
            let mut parts = Path::new(file).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        };
        if let Some(file) = weight_map.values().find(|file| !plain(file)) {
            return Err(Error::damaged(path, format!("it names the file `{file}`, and shards lie beside their index")));
        }
        if weight_map.is_empty() {
            return Err(Error::damaged(path, "it names no tensor"));
        }
        Ok(Index { path: path.to_owned(), weight_map, metadata })
    }

    /// The shards, in order of their names.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let names: BTreeSet<&String> = self.weight_map.values().collect();
        names.into_iter().map(|name| self.path.with_file_name(name)).collect()
    }

    /// An index like this one of other tensors and sizes.
    pub(super) fn with(&self, weight_map: &BTreeMap<&str, &str>, total_size: usize) -> Vec<u8> {
        let mut metadata = self.metadata.clone();
        metadata.insert("total_size".into(), total_size.into());
        format!("{:#}\n", json!({ "metadata": metadata, "weight_map": weight_map })).into_bytes()
    }
}
