//! Files of a pass: one or several shards for each target, with the same layout for all targets.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::part::{OutputPart, PAGE};
use super::source_set::{ModelTensor, SourceSet};
use crate::error::Result;
use crate::fs::{AtomicFile, SharedFile, Stream};
use crate::snapshot::FileLayout;
use crate::tensor::TensorSpec;

/// Assignment of tensors to the files of a target.
pub(crate) struct Shards(Vec<Shard>);

/// One file: the indices of its tensors, and its layout.
struct Shard {
    members: Vec<usize>,
    layout: FileLayout,
}

/// Location of a tensor in the files of a target.
pub(super) struct TensorLocation {
    /// Index of its file.
    pub file: usize,
    /// Index of the tensor in its [`SourceSet`].
    pub tensor: usize,
    /// Dtype in the file.
    pub dtype: Dtype,
    /// Range of its bytes in the file's data section.
    pub range: Range<usize>,
    /// Offset of the file's data section in those of all files, one after the other.
    pub base: usize,
}

impl TensorLocation {
    /// Returns the tensor's elements of `size` bytes that begin within a range of all data sections.
    pub(super) fn elements_in(&self, share: &Range<usize>, size: usize) -> Range<usize> {
        let start = self.base + self.range.start;
        let count = self.range.len() / size;
        let before = |end: usize| end.saturating_sub(start).div_ceil(size).min(count);
        before(share.start)..before(share.end)
    }
}

/// Bytes before the data section of a file, and the length of the whole file.
pub(crate) struct FileHeader {
    pub bytes: Vec<u8>,
    pub file_len: u64,
}

/// Path and metadata of one file of a target.
pub(crate) struct OutputFile {
    pub path: PathBuf,
    pub metadata: BTreeMap<String, String>,
}

/// Tensor of a file: its index in the [`SourceSet`], its name there, and its dtype.
#[derive(Clone, Debug)]
pub(crate) struct ShardTensor {
    pub tensor: usize,
    pub name: String,
    pub dtype: Dtype,
}

impl ShardTensor {
    /// Returns a tensor under its own name. `dtype` is that of averaged tensors, `None` for the model's own.
    pub(crate) fn own(set: &SourceSet<'_>, tensor: usize, dtype: Option<Dtype>) -> ShardTensor {
        let ModelTensor { name, dtype: own, averaged, .. } = &set.tensors[tensor];
        ShardTensor { tensor, name: name.clone(), dtype: dtype.filter(|_| *averaged).unwrap_or(*own) }
    }
}

impl Shards {
    /// Lays out one file for each list of tensors.
    ///
    /// # Errors
    /// As [`FileLayout::new`].
    pub(crate) fn new(set: &SourceSet<'_>, parts: Vec<Vec<ShardTensor>>) -> Result<Shards> {
        let mut shards = Vec::with_capacity(parts.len());
        for part in parts {
            let members = part.iter().map(|member| member.tensor).collect();
            let spec = |ShardTensor { tensor, name, dtype }: ShardTensor| {
                let shape = set.tensors[tensor].shape.clone();
                TensorSpec { name, dtype, shape }
            };
            shards.push(Shard { members, layout: FileLayout::new(part.into_iter().map(spec).collect())? });
        }
        Ok(Shards(shards))
    }

    /// Lays out a single file that holds all tensors. `dtype` is that of averaged tensors, `None` for the model's own.
    ///
    /// # Errors
    /// As [`Shards::new`].
    pub(crate) fn single(set: &SourceSet<'_>, dtype: Option<Dtype>) -> Result<Shards> {
        let all = (0..set.tensors.len()).map(|tensor| ShardTensor::own(set, tensor, dtype)).collect();
        Shards::new(set, vec![all])
    }

    /// Number of files.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Bytes of all tensors in the first files.
    pub(crate) fn data_len(&self, files: usize) -> usize {
        self.0.iter().take(files).map(|shard| shard.layout.data_len()).sum()
    }

    /// Iterates over the locations of all tensors, file by file, in the order of each file.
    pub(super) fn locations(&self) -> impl Iterator<Item = TensorLocation> {
        self.0.iter().zip(self.bases()).enumerate().flat_map(|(file, (Shard { members, layout }, base))| {
            layout.places().iter().map(move |place| TensorLocation {
                file,
                tensor: members[place.index],
                dtype: layout.specs()[place.index].dtype,
                range: place.range.clone(),
                base,
            })
        })
    }

    /// Iterates over the offset of each file's data section in those of all files, one after the other.
    ///
    /// Each begins at a page, so that a cut between parts is at a page of its file.
    fn bases(&self) -> impl Iterator<Item = usize> {
        let padded = |shard: &Shard| shard.layout.data_len().next_multiple_of(PAGE);
        self.0.iter().scan(0, move |end, shard| Some(std::mem::replace(end, *end + padded(shard))))
    }

    /// Returns the range of all data sections.
    pub(super) fn all(&self) -> Range<usize> {
        0..self.bases().last().unwrap_or(0) + self.0.last().map_or(0, |shard| shard.layout.data_len())
    }

    /// Returns the header of a file.
    ///
    /// # Errors
    /// As [`FileLayout::header`].
    pub(crate) fn header(&self, file: usize, metadata: &BTreeMap<String, String>) -> Result<FileHeader> {
        let layout = &self.0[file].layout;
        let bytes = layout.header(metadata)?;
        Ok(FileHeader { file_len: (bytes.len() + layout.data_len()) as u64, bytes })
    }

    /// Returns a part's range of all data sections.
    pub(super) fn share(&self, part: OutputPart) -> Range<usize> {
        part.share(self.all().end)
    }

    /// Opens the files of one target that a part writes to. The first part writes the headers.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), and as [`FileLayout::header`].
    pub(super) fn open(&self, outputs: &[OutputFile], part: OutputPart) -> Result<OutputFiles> {
        let share = self.share(part);
        let mut files = Vec::with_capacity(outputs.len());
        for ((shard, base), output) in self.0.iter().zip(self.bases()).zip(outputs) {
            let header = shard.layout.header(&output.metadata)?;
            let own = share.start.max(base)..share.end.min(base + shard.layout.data_len());
            let sink = match own.is_empty() && part.number() > 1 {
                true => WeightSink::Nowhere,
                false => WeightSink::Shared(SharedFile::open(&output.path)?),
            };
            if part.number() == 1 {
                sink.write_at(0, &header)?;
            }
            files.push((sink, header.len() as u64));
        }
        Ok(OutputFiles(files))
    }

    /// Creates the files of one target under temporary names, and writes their headers.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), and as [`FileLayout::header`].
    pub(super) fn create(&self, outputs: &[OutputFile]) -> Result<OutputFiles> {
        debug_assert_eq!(outputs.len(), self.len());
        let mut files = Vec::with_capacity(outputs.len());
        for (shard, output) in self.0.iter().zip(outputs) {
            let file = WeightSink::create(&output.path)?;
            let header = shard.layout.header(&output.metadata)?;
            file.write_at(0, &header)?;
            files.push((file, header.len() as u64));
        }
        Ok(OutputFiles(files))
    }
}

/// Files of one target under temporary names, each with the offset of its data section.
pub(super) struct OutputFiles(Vec<(WeightSink, u64)>);

/// File under a temporary name, one that several processes write to, or a stream.
enum WeightSink {
    File(AtomicFile),
    Shared(SharedFile),
    Stream(Stream),
    /// File that only other processes write to.
    Nowhere,
}

impl WeightSink {
    fn create(path: &Path) -> Result<WeightSink> {
        match Stream::open(path)? {
            Some(stream) => Ok(WeightSink::Stream(stream)),
            None => AtomicFile::create(path).map(WeightSink::File),
        }
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            WeightSink::File(file) => file.write_at(offset, bytes),
            WeightSink::Shared(file) => file.write_at(offset, bytes),
            WeightSink::Stream(stream) => stream.write_at(offset, bytes),
            WeightSink::Nowhere => Ok(()),
        }
    }

    fn write_block_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            WeightSink::File(file) => file.write_block_at(offset, bytes),
            WeightSink::Shared(file) => file.write_at(offset, bytes),
            WeightSink::Stream(stream) => stream.write_at(offset, bytes),
            WeightSink::Nowhere => Ok(()),
        }
    }

    fn commit(self) -> Result<()> {
        match self {
            WeightSink::File(file) => file.commit(),
            WeightSink::Shared(file) => file.sync(),
            WeightSink::Stream(stream) => stream.commit(),
            WeightSink::Nowhere => Ok(()),
        }
    }
}

impl OutputFiles {
    /// Writes bytes at an offset of a file's data section, from any thread.
    pub(super) fn write_at(&self, file: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let (file, data) = &self.0[file];
        file.write_at(data + offset as u64, bytes)
    }

    /// As [`OutputFiles::write_at`], for a large block: see [`AtomicFile::write_block_at`].
    pub(super) fn write_block_at(&self, file: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let (file, data) = &self.0[file];
        file.write_block_at(data + offset as u64, bytes)
    }

    /// Renames all files to their final names. Files of several processes are only made durable.
    pub(super) fn commit(self) -> Result<()> {
        self.0.into_iter().try_for_each(|(file, _)| file.commit())
    }
}
