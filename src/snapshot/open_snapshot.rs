//! Opening a snapshot: its files as one set of tensors.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::extension::AllowedDifferences;
use super::global_tensor::GlobalTensor;
use super::id::SnapshotId;
use super::meta::Meta;
use super::read::StoredFile;
use super::set_meta::read_meta;
use super::shards;
use super::tensor_set::{StoredElements, TensorSet};
use super::tensors::StoredTensor;
use crate::error::{Difference, Error, Result};
use crate::fs::{find_document, parent_dir};
use crate::tensor::{compare_tensors, is_averaged};

/// Snapshot whose files are mapped and checked.
#[derive(Debug)]
pub struct Snapshot {
    /// Index of the profile, and step.
    pub id: SnapshotId,
    /// Metadata of all files together.
    pub meta: Meta,
    set: TensorSet,
}

impl Snapshot {
    /// Opens the files of one snapshot: one file, shards, or the files of all processes of a sharded training.
    ///
    /// # Errors
    /// Those of [`StoredFile::open`] and [`Meta::from_strings`], [`Error::Unexpected`] for a file whose name and
    /// contents disagree, [`Error::Damaged`] or [`Error::Mismatch`] for files that do not belong together, and
    /// [`Error::NoSource`] without a path.
    pub fn open(id: SnapshotId, paths: &[PathBuf]) -> Result<Snapshot> {
        Snapshot::open_like(id, paths, None, true)
    }

    /// As [`Snapshot::open`], and faster if the headers agree with those of a sibling. `is_mapped` is as in
    /// [`TensorSet::open`].
    pub(super) fn open_like(
        id: SnapshotId,
        paths: &[PathBuf],
        sibling: Option<&Snapshot>,
        is_mapped: bool,
    ) -> Result<Snapshot> {
        let mut set = TensorSet::open(paths, sibling.map(|sibling| &sibling.set), is_mapped)?;
        let known = sibling.filter(|sibling| set.shares_tensors(&sibling.set));
        let meta = read_meta(id, &set, known.map(|sibling| (&sibling.set, &sibling.meta)))?;
        if set.files().len() > 1 {
            set.forget_metadata();
        }
        let snapshot = Snapshot { id, meta, set };
        let agrees =
            |sibling: &Snapshot| snapshot.shares_tensors(sibling) && snapshot.meta.copied == sibling.meta.copied;
        if !sibling.is_some_and(agrees) {
            snapshot.check_dtypes()?;
        }
        snapshot.check_ties()?;
        Ok(snapshot)
    }

    /// Compares the index of a snapshot in shards with the shards. A missing index was not written yet.
    ///
    /// # Errors
    /// [`Error::Damaged`] if they differ, [`Error::Io`] if the index cannot be read.
    pub fn verify_index(&self) -> Result<()> {
        let files = self.files();
        if files.len() == 1 || self.set.has_parts() {
            return Ok(());
        }
        let path = parent_dir(self.path()).join(self.id.index_name());
        let Some(found) = find_document(&path)? else { return Ok(()) };
        let tensors = files.iter().enumerate().flat_map(|(shard, file)| {
            file.tensors().iter().map(move |(name, tensor)| (shard, name, tensor.range.len()))
        });
        if found != shards::index(self.id, files.len(), tensors).to_json().as_bytes() {
            return Err(Error::damaged(&path, "it does not list the tensors of the shards beside it: remove the file"));
        }
        Ok(())
    }

    /// Returns the path of the first file, which stands for the snapshot in messages.
    pub fn path(&self) -> &Path {
        self.files()[0].path()
    }

    /// Returns the files of the snapshot.
    pub fn files(&self) -> &[StoredFile] {
        self.set.files()
    }

    /// Frees the page tables of everything that was read, as closing the files would.
    pub(crate) fn unmap_pages(&self) {
        self.files().iter().for_each(StoredFile::unmap_pages);
    }

    /// Announces that bytes of these files will soon be read.
    pub(crate) fn will_need(&self, bytes: &[u8]) {
        self.files().iter().for_each(|file| file.will_need(bytes));
    }

    /// Returns the tensors, wherever their elements are.
    pub(crate) fn set(&self) -> &TensorSet {
        &self.set
    }

    /// Iterates over all tensors, by name. Shapes are those of whole tensors.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.set.tensors()
    }

    /// Returns a tensor without its bytes.
    pub fn stored(&self, name: &str) -> Option<&StoredTensor> {
        self.set.get(name)
    }

    /// Returns a tensor and its bytes, which are copied if they are not in one piece.
    pub fn tensor(&self, name: &str) -> Option<(&StoredTensor, Cow<'_, [u8]>)> {
        let (tensor, elements) = self.tensor_near(name, &mut 0)?;
        let bytes = match elements {
            StoredElements::Whole(bytes) => Cow::Borrowed(bytes),
            StoredElements::Tiled(elements) => {
                let mut bytes = vec![0; elements.len()];
                elements.copy(&mut bytes, 0);
                Cow::Owned(bytes)
            }
        };
        Some((tensor, bytes))
    }

    /// Returns a tensor and its elements; `None` if there is none, or if its files cannot be mapped. `place` is a guess
    /// of its position in the order of names, such as that in a sibling, and becomes its position.
    pub(crate) fn tensor_near(&self, name: &str, place: &mut usize) -> Option<(&StoredTensor, StoredElements<'_>)> {
        let tensor = self.located(name, place)?;
        Some((&tensor.stored, self.set.elements(*place).ok()?))
    }

    /// Returns the bytes of the elements of a tensor. `place` is as in [`Snapshot::tensor_near`].
    pub(crate) fn bytes_of(&self, name: &str, place: &mut usize) -> Option<u64> {
        Some(self.located(name, place)?.stored.range.len() as u64)
    }

    /// Returns a tensor and its parts. `place` is as in [`Snapshot::tensor_near`].
    pub(super) fn located(&self, name: &str, place: &mut usize) -> Option<&GlobalTensor> {
        *place = self.set.find(name, *place)?;
        Some(self.set.at(*place))
    }

    /// Returns the model's dtype of a tensor, given the dtype it is stored in.
    pub fn model_dtype(&self, name: &str, stored: Dtype) -> Dtype {
        self.meta.dtypes.get(name).copied().unwrap_or(stored)
    }

    /// Returns the size of all files in bytes.
    pub fn len(&self) -> u64 {
        self.files().iter().map(StoredFile::len).sum()
    }

    /// Returns true if the snapshot has no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors().next().is_none()
    }

    /// Compares the tensors with those of another snapshot of the same run.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for another run's id, other names, shapes or dtypes.
    pub fn check_sibling(&self, other: &Snapshot) -> Result<()> {
        self.difference(other).map_or(Ok(()), |difference| Err(Error::mismatch(self.path(), other.path(), difference)))
    }

    /// Returns the first difference that two snapshots of one run must not have.
    fn difference(&self, other: &Snapshot) -> Option<Difference> {
        if self.meta.run != other.meta.run {
            let id = |snapshot: &Snapshot| snapshot.meta.run.clone().unwrap_or_else(|| "none".into());
            return Some(Difference::new("the run's id", id(other), id(self)));
        }
        let Some(allowed) = AllowedDifferences::between(&self.meta.extensions, &other.meta.extensions) else {
            let list = |snapshot: &Snapshot| serde_json::json!(snapshot.meta.extensions).to_string();
            return Some(Difference::new("the list of extensions", list(other), list(self)));
        };
        if !self.shares_tensors(other)
            && let Some(difference) = compare_tensors(self.kept_specs(&allowed), other.kept_specs(&allowed))
        {
            return Some(difference);
        }
        if allowed.is_empty() && self.meta.tied != other.meta.tied {
            let expected = format!("{:?}", other.meta.tied);
            return Some(Difference::new("the list of tied tensors", expected, format!("{:?}", self.meta.tied)));
        }
        if allowed.is_empty() && self.meta.copied != other.meta.copied {
            let expected = format!("{:?}", other.meta.copied);
            return Some(Difference::new("the list of copied tensors", expected, format!("{:?}", self.meta.copied)));
        }
        None
    }

    /// Checks that a snapshot of the same index is of the same profile.
    ///
    /// # Errors
    /// [`Error::Mismatch`].
    pub(super) fn check_profile(&self, other: &Snapshot) -> Result<()> {
        if self.meta.profile == other.meta.profile {
            return Ok(());
        }
        let difference = Difference::new("the profile", &other.meta.profile, &self.meta.profile);
        Err(Error::mismatch(self.path(), other.path(), difference))
    }

    /// Returns true if names, shapes and dtypes are known to equal those of a sibling.
    pub(super) fn shares_tensors(&self, other: &Snapshot) -> bool {
        self.set.shares_tensors(&other.set) && self.meta.dtypes == other.meta.dtypes
    }

    /// Iterates over name, model dtype and shape of every tensor that another snapshot must have alike.
    ///
    /// Tensors whose dtype may differ all have one dtype here.
    fn kept_specs<'a>(
        &'a self,
        allowed: &'a AllowedDifferences<'_>,
    ) -> impl Iterator<Item = (&'a str, Dtype, &'a [usize])> {
        self.tensors().filter(|(name, _)| allowed.keeps(name)).map(|(name, stored)| {
            let dtype = self.model_dtype(name, stored.dtype);
            let dtype = if allowed.keeps_dtype(name) { dtype } else { Dtype::F32 };
            (name, dtype, stored.shape.as_slice())
        })
    }

    /// Checks the model dtypes in the metadata: only an averaged tensor may be stored in another dtype.
    fn check_dtypes(&self) -> Result<()> {
        let mut place = 0;
        for (name, &dtype) in self.meta.dtypes.iter() {
            let stored = self.located(name, &mut place).map(|tensor| &tensor.stored);
            place += 1;
            let is_valid = |stored: &StoredTensor| {
                is_averaged(stored.dtype) && is_averaged(dtype) && !self.meta.copied.contains(name)
            };
            if !stored.is_some_and(is_valid) {
                let why = format!("the metadata give tensor `{name}` the dtype {dtype}, which cannot be");
                return Err(Error::damaged(self.path(), why));
            }
        }
        Ok(())
    }

    fn check_ties(&self) -> Result<()> {
        let exists = |name: &str| self.set.find(name, 0).is_some();
        match self.meta.tied.iter().find(|(dropped, kept)| !exists(kept) || exists(dropped)) {
            Some((dropped, kept)) => {
                let why = format!("the metadata tie `{dropped}` to `{kept}`, but only the second may and must exist");
                Err(Error::damaged(self.path(), why))
            }
            None => Ok(()),
        }
    }
}
