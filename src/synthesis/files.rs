//! The files of a pass: for each target one, or as many shards, laid out alike for all targets.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use safetensors::Dtype;

use super::source_set::{ModelTensor, SourceSet};
use crate::error::Result;
use crate::fs::AtomicFile;

use crate::snapshot::FileLayout;

use crate::tensor::TensorSpec;

/// How the tensors of a pool are dealt out to files.
pub(crate) struct Shards(Vec<Shard>);

/// One file: which tensors of the pool it holds, and where.
struct Shard {
    members: Vec<usize>,
    layout: FileLayout,
}

/// Where a tensor lies.
pub(super) struct TensorLocation {
    /// The index of its file.
    pub file: usize,
    /// Its index within the pool.
    pub tensor: usize,
    /// Its dtype in the file.
    pub dtype: Dtype,
    /// Its bytes within the file's data section.
    pub range: Range<usize>,
}

/// The name of one file of a target, and what it says of itself.
pub(crate) struct OutputFile {
    pub path: PathBuf,
    pub metadata: BTreeMap<String, String>,
}

impl Shards {
    /// Lays out files that hold the tensors with these indices; averaged ones in the dtype that is given.
    ///
    /// # Errors
    /// As [`FileLayout::new`].
    pub(crate) fn new(pool: &SourceSet<'_>, dtype: Option<Dtype>, parts: Vec<Vec<usize>>) -> Result<Shards> {
        let shard = |members: Vec<usize>| {
            let specs = members.iter().map(|&member| spec(&pool.tensors[member], dtype)).collect();
            Ok(Shard { members, layout: FileLayout::new(specs)? })
        };
        parts.into_iter().map(shard).collect::<Result<_>>().map(Shards)
    }

    /// Lays out a single file that holds all tensors.
    ///
    /// # Errors
    /// As [`Shards::new`].
    pub(crate) fn single(pool: &SourceSet<'_>, dtype: Option<Dtype>) -> Result<Shards> {
        Shards::new(pool, dtype, vec![(0..pool.tensors.len()).collect()])
    }

    /// How many files there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The bytes of all tensors.
    pub(crate) fn data_len(&self) -> usize {
        self.0.iter().map(|shard| shard.layout.data_len()).sum()
    }

    /// All tensors, file by file, in the order of each file.
    pub(super) fn spots(&self) -> impl Iterator<Item = TensorLocation> {
        self.0.iter().enumerate().flat_map(|(file, Shard { members, layout })| {
            layout.places().iter().map(move |place| TensorLocation {
                file,
                tensor: members[place.index],
                dtype: layout.specs()[place.index].dtype,
                range: place.range.clone(),
            })
        })
    }

    /// Begins the files of one target and writes their headers.
    pub(super) fn create(&self, heads: &[OutputFile]) -> Result<OutputFiles> {
        debug_assert_eq!(heads.len(), self.len());
        let begin = |(shard, head): (&Shard, &OutputFile)| {
            let file = AtomicFile::create(&head.path)?;
            let header = shard.layout.header(&head.metadata)?;
            file.write_at(0, &header)?;
            Ok((file, header.len() as u64))
        };
        self.0.iter().zip(heads).map(begin).collect::<Result<_>>().map(OutputFiles)
    }
}

/// What a tensor becomes in a file: averaged ones in the dtype asked for, copies as they are.
fn spec(tensor: &ModelTensor, dtype: Option<Dtype>) -> TensorSpec {
    let dtype = if tensor.averaged { dtype.unwrap_or(tensor.dtype) } else { tensor.dtype };
    TensorSpec { name: tensor.name.clone(), dtype, shape: tensor.shape.clone() }
}

/// The files of one target while they are written, and where the data section of each begins.
pub(super) struct OutputFiles(Vec<(AtomicFile, u64)>);

impl OutputFiles {
    /// Writes bytes at an offset of a file's data section; from any thread.
    pub(super) fn write_at(&self, file: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let (file, data) = &self.0[file];
        file.write_at(data + offset as u64, bytes)
    }

    /// As [`OutputFiles::write_at`], with several threads.
    pub(super) fn write_block_at(&self, file: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let (file, data) = &self.0[file];
        file.write_block_at(data + offset as u64, bytes)
    }

    /// Gives all files their names.
    pub(super) fn commit(self) -> Result<()> {
        self.0.into_iter().try_for_each(|(file, _)| file.commit())
    }
}
