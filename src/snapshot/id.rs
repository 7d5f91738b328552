//! Names of the files of a snapshot.

use std::fmt;

/// Identity of a snapshot within its run: the index of the profile and the step.
///
/// The names of its files begin with it, as in `0.1000.safetensors`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotId {
    /// Index of the profile within the run.
    pub index: usize,
    /// Step of the newest update.
    pub step: u64,
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index, self.step)
    }
}

impl SnapshotId {
    /// Returns the name of a snapshot in one file.
    pub fn file_name(self) -> String {
        format!("{self}.safetensors")
    }

    /// Returns the name of shard `i` of `n`, counted from 1.
    pub fn shard_name(self, i: usize, n: usize) -> String {
        format!("{self}-{i:05}-of-{n:05}.safetensors")
    }

    /// Returns the name of part file `i` of `n`, counted from 1, of a sharded training.
    pub(crate) fn part_name(self, i: usize, n: usize) -> String {
        format!("{self}-{}.safetensors", PartNumber { i, n })
    }

    /// Returns the name of the index of the shards.
    pub fn index_name(self) -> String {
        format!("{self}.safetensors.index.json")
    }
}

/// Role of a file within a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum FileRole {
    /// The only file of the snapshot.
    Whole,
    /// Shard `i` of `n`, counted from 1.
    Shard { i: usize, n: usize },
    /// File that one process of a sharded training wrote.
    Part(PartNumber),
    /// Index of the shards.
    Index,
}

/// Number of a file within a set, and the size of the set. Each process of a sharded training wrote one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PartNumber {
    /// Counted from 1.
    pub i: usize,
    pub n: usize,
}

impl fmt::Display for PartNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "part-{:05}-of-{:05}", self.i, self.n)
    }
}

impl PartNumber {
    /// Parses the text of a number, in the only form that it is written in.
    pub(super) fn parse(text: &str) -> Option<PartNumber> {
        let (i, n) = text.strip_prefix("part-")?.split_once("-of-")?;
        let number = PartNumber { i: i.parse().ok()?, n: n.parse().ok()? };
        (number.to_string() == text && (1..=number.n).contains(&number.i)).then_some(number)
    }
}

/// Parses a file name, or returns `None` if no snapshot has a file of exactly this name.
pub(super) fn parse(name: &str) -> Option<(SnapshotId, FileRole)> {
    let (id, role) = if let Some(id) = name.strip_suffix(".safetensors.index.json") {
        (id, FileRole::Index)
    } else {
        let base = name.strip_suffix(".safetensors")?;
        match base.split_once('-') {
            None => (base, FileRole::Whole),
            Some((id, part)) if part.starts_with("part-") => (id, FileRole::Part(PartNumber::parse(part)?)),
            Some((id, shard)) => {
                let (i, n) = shard.split_once("-of-")?;
                (id, FileRole::Shard { i: i.parse().ok()?, n: n.parse().ok()? })
            }
        }
    };
    let (index, step) = id.split_once('.')?;
    let id = SnapshotId { index: index.parse().ok()?, step: step.parse().ok()? };
    let canonical = match role {
        FileRole::Whole => id.file_name(),
        FileRole::Shard { i, n } => id.shard_name(i, n),
        FileRole::Part(PartNumber { i, n }) => id.part_name(i, n),
        FileRole::Index => id.index_name(),
    };
    (canonical == name).then_some((id, role))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_canonical_names_parse() {
        let id = SnapshotId { index: 1, step: 2000 };
        assert_eq!(parse("1.2000.safetensors"), Some((id, FileRole::Whole)));
        assert_eq!(parse("1.2000-00002-of-00003.safetensors"), Some((id, FileRole::Shard { i: 2, n: 3 })));
        let part = FileRole::Part(PartNumber { i: 2, n: 3 });
        assert_eq!(parse("1.2000-part-00002-of-00003.safetensors"), Some((id, part)));
        assert_eq!(parse("1.2000.safetensors.index.json"), Some((id, FileRole::Index)));
        for other in [
            "01.2000.safetensors",
            "1.+2.safetensors",
            "1.safetensors",
            "state.safetensors",
            "1.2-2-of-3.safetensors",
            "1.2-part-2-of-3.safetensors",
            "1.2-part-00004-of-00003.safetensors",
            "1.2-part-00000-of-00003.safetensors",
            "1.2-part-00001.safetensors",
            "x",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
