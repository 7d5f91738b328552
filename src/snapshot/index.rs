//! Index of a model in shards, in Hugging Face's format: `model.safetensors.index.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::fs::read_document;

/// Suffix of the file names of indices.
pub(crate) const INDEX_SUFFIX: &str = ".index.json";

/// Assignment of a model's tensors to the shards beside its index.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub(crate) struct ShardIndex {
    #[serde(default)]
    metadata: Map<String, Value>,
    /// File name of the shard of each tensor, by the tensor's name.
    weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// Reads and checks an index.
    ///
    /// # Errors
    /// As [`read_document`], and [`Error::Damaged`] if the file is not an index, names no tensor, or names files that
    /// are not beside it.
    pub(crate) fn read(path: &Path) -> Result<ShardIndex> {
        let text = read_document(path)?;
        let index: ShardIndex = serde_json::from_slice(&text).map_err(|error| Error::damaged(path, error))?;
        if let Some(file) = index.weight_map.values().find(|file| !is_plain_name(file)) {
            return Err(Error::damaged(path, format!("it names the file `{file}`, which is not beside the index")));
        }
        if index.weight_map.is_empty() {
            return Err(Error::damaged(path, "it names no tensor"));
        }
        Ok(index)
    }

    /// Returns an index with other tensors, `total_size` bytes in all, that keeps the rest of the metadata.
    pub(crate) fn with_tensors(&self, weight_map: BTreeMap<String, String>, total_size: usize) -> ShardIndex {
        let mut metadata = self.metadata.clone();
        metadata.insert("total_size".into(), total_size.into());
        ShardIndex { metadata, weight_map }
    }

    /// Returns the file name of the shard of each tensor, by the tensor's name.
    pub(crate) fn weight_map(&self) -> &BTreeMap<String, String> {
        &self.weight_map
    }

    /// Returns the size of all tensors in bytes, if the index has it.
    pub(crate) fn total_size(&self) -> Option<u64> {
        self.metadata.get("total_size")?.as_u64()
    }

    /// Returns the file names of the shards, in order.
    pub(crate) fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }

    /// Returns the text of the file.
    pub(crate) fn to_json(&self) -> String {
        let ShardIndex { metadata, weight_map } = self;
        format!("{:#}\n", json!({ "metadata": metadata, "weight_map": weight_map }))
    }
}

/// Returns true if a file name has no directory in it.
fn is_plain_name(file: &str) -> bool {
    let mut components = Path::new(file).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_index_is_read_back_with_its_metadata() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors.index.json");
        std::fs::write(&path, r#"{"metadata":{"format":"pt","total_size":1},"weight_map":{"a":"1","b":"2"}}"#).unwrap();
        let read = ShardIndex::read(&path).unwrap();
        assert_eq!(read.shards().into_iter().collect::<Vec<_>>(), ["1", "2"]);
        let other = read.with_tensors(BTreeMap::from([("c".into(), "3".into())]), 7);
        std::fs::write(&path, other.to_json()).unwrap();
        assert_eq!(ShardIndex::read(&path).unwrap(), other);
        let text = "{\n  \"metadata\": {\n    \"format\": \"pt\",\n    \"total_size\": 7\n  },\n";
        assert!(other.to_json().starts_with(text), "{}", other.to_json());
    }

    #[test]
    fn files_elsewhere_and_empty_indices_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.json");
        for (weight_map, expected) in [
            (r#"{"a":"../1"}"#, "names the file `../1`, which is not beside the index"),
            (r#"{"a":"/1"}"#, "names the file `/1`"),
            ("{}", "it names no tensor"),
            ("3", "invalid type"),
        ] {
            std::fs::write(&path, format!(r#"{{"weight_map":{weight_map}}}"#)).unwrap();
            let text = ShardIndex::read(&path).unwrap_err().to_string();
            assert!(text.contains(expected) && text.contains("index.json"), "{text}");
        }
    }
}
