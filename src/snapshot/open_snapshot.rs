//! Opening a snapshot: its files as one set of tensors.

use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::extension::AllowedDifferences;
use super::id::SnapshotId;
use super::meta::Meta;
use super::read::StoredFile;
use super::shards;
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
    files: Vec<StoredFile>,
    /// Locations of all tensors, in order of their names.
    places: Vec<Place>,
}

/// Location of a tensor: its file, and its position in the order of names there.
#[derive(Clone, Copy, Debug)]
struct Place {
    file: usize,
    tensor: usize,
}

impl Snapshot {
    /// Opens the files of one snapshot.
    ///
    /// # Errors
    /// Those of [`StoredFile::open`] and [`Meta::from_strings`], [`Error::Unexpected`] for a file whose name and
    /// contents disagree, and [`Error::NoSource`] without a path.
    pub fn open(id: SnapshotId, paths: &[PathBuf]) -> Result<Snapshot> {
        Snapshot::open_like(id, paths, None)
    }

    /// As [`Snapshot::open`], and faster if the headers agree with those of a sibling.
    pub(super) fn open_like(id: SnapshotId, paths: &[PathBuf], sibling: Option<&Snapshot>) -> Result<Snapshot> {
        let mut files = Vec::with_capacity(paths.len());
        for (i, path) in paths.iter().enumerate() {
            let like = sibling.and_then(|sibling| sibling.files.get(i));
            files.push(StoredFile::open_like(path, like)?);
        }
        let meta = read_meta(id, &files, sibling)?;
        let snapshot = Snapshot { id, meta, places: places(&files)?, files };
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
        if self.files.len() == 1 {
            return Ok(());
        }
        let path = parent_dir(self.path()).join(self.id.index_name());
        let Some(found) = find_document(&path)? else { return Ok(()) };
        let tensors = self.files.iter().enumerate().flat_map(|(shard, file)| {
            file.tensors().iter().map(move |(name, tensor)| (shard, name, tensor.range.len()))
        });
        if found != shards::index(self.id, self.files.len(), tensors).to_json().as_bytes() {
            return Err(Error::damaged(&path, "it does not list the tensors of the shards beside it: remove the file"));
        }
        Ok(())
    }

    /// Returns the path of the first file, which stands for the snapshot in messages.
    pub fn path(&self) -> &Path {
        self.files[0].path()
    }

    /// Returns the files of the snapshot.
    pub fn files(&self) -> &[StoredFile] {
        &self.files
    }

    /// Frees the page tables of everything that was read, as closing the files would.
    pub(crate) fn unmap_pages(&self) {
        self.files.iter().for_each(StoredFile::unmap_pages);
    }

    /// Iterates over all tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.places.iter().map(|&place| entry(&self.files, place))
    }

    /// Returns a tensor and its bytes.
    pub fn tensor(&self, name: &str) -> Option<(&StoredTensor, &[u8])> {
        self.tensor_near(name, &mut 0)
    }

    /// Returns a tensor and its bytes. `place` is a guess of its position in the order of names, such as that in a
    /// sibling, and becomes its position.
    pub(crate) fn tensor_near(&self, name: &str, place: &mut usize) -> Option<(&StoredTensor, &[u8])> {
        let (file, tensor) = self.located(name, place)?;
        Some((tensor, self.files[file].bytes(tensor)))
    }

    /// Returns the index of the file that holds a tensor, and the tensor. `place` is as in [`Snapshot::tensor_near`].
    pub(super) fn located(&self, name: &str, place: &mut usize) -> Option<(usize, &StoredTensor)> {
        *place = self.find(name, *place)?;
        let Place { file, tensor } = self.places[*place];
        Some((file, self.files[file].tensors().at(tensor).1))
    }

    fn find(&self, name: &str, near: usize) -> Option<usize> {
        let name_at = |place: &Place| entry(&self.files, *place).0;
        if self.places.get(near).is_some_and(|place| name_at(place) == name) {
            return Some(near);
        }
        self.places.binary_search_by(|place| name_at(place).cmp(name)).ok()
    }

    /// Returns the model's dtype of a tensor, given the dtype it is stored in.
    pub fn model_dtype(&self, name: &str, stored: Dtype) -> Dtype {
        self.meta.dtypes.get(name).copied().unwrap_or(stored)
    }

    /// Returns the size of all files in bytes.
    pub fn len(&self) -> u64 {
        self.files.iter().map(StoredFile::len).sum()
    }

    /// Returns true if the snapshot has no tensors.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
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
        self.files.len() == other.files.len()
            && self.files.iter().zip(&other.files).all(|(own, other)| own.shares_tensors(other))
            && self.meta.dtypes == other.meta.dtypes
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
            let stored = self.tensor_near(name, &mut place);
            place += 1;
            let is_valid = |(stored, _): (&StoredTensor, &[u8])| {
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
        let exists = |name: &str| self.find(name, 0).is_some();
        match self.meta.tied.iter().find(|(dropped, kept)| !exists(kept) || exists(dropped)) {
            Some((dropped, kept)) => {
                let why = format!("the metadata tie `{dropped}` to `{kept}`, but only the second may and must exist");
                Err(Error::damaged(self.path(), why))
            }
            None => Ok(()),
        }
    }
}

/// Checks the headers of a snapshot's files and merges their metadata.
fn read_meta(id: SnapshotId, files: &[StoredFile], sibling: Option<&Snapshot>) -> Result<Meta> {
    // Only the metadata of a snapshot in one file equal the strings of that file: shards hold parts of them.
    let whole = sibling.filter(|sibling| sibling.files.len() == 1);
    let known = whole.map(|sibling| (sibling.files[0].metadata(), &sibling.meta));
    let mut meta: Option<Meta> = None;
    for file in files {
        file.check_header()?;
        let own = Meta::from_strings_like(file.path(), file.metadata(), known)?;
        check_step(file, id, &own)?;
        match &mut meta {
            None => meta = Some(own),
            Some(meta) => merge(meta, own, file.path(), files[0].path())?,
        }
    }
    meta.ok_or_else(|| Error::NoSource { wanted: format!("file of snapshot {id}"), remedy: "name its files" })
}

fn entry(files: &[StoredFile], place: Place) -> (&str, &StoredTensor) {
    files[place.file].tensors().at(place.tensor)
}

/// Returns the locations of all tensors in order of their names, and checks that none is in two files.
fn places(files: &[StoredFile]) -> Result<Vec<Place>> {
    let of_file =
        |(file, stored): (usize, &StoredFile)| (0..stored.tensors().len()).map(move |tensor| Place { file, tensor });
    let mut places: Vec<Place> = files.iter().enumerate().flat_map(of_file).collect();
    if files.len() > 1 {
        // The sort is stable: of two equal names, the one in the earlier file comes first.
        places.sort_by_key(|&place| entry(files, place).0);
    }
    let duplicate = places.windows(2).find(|pair| entry(files, pair[0]).0 == entry(files, pair[1]).0);
    match duplicate {
        Some(&[_, second]) => {
            let why = format!("tensor `{}` is in another shard too", entry(files, second).0);
            Err(Error::damaged(files[second.file].path(), why))
        }
        _ => Ok(places),
    }
}

/// Checks that a file holds the step that its name claims.
fn check_step(file: &StoredFile, id: SnapshotId, meta: &Meta) -> Result<()> {
    if meta.step == id.step {
        return Ok(());
    }
    let why = format!("the name says step {}, but the file holds step {}: restore its name", id.step, meta.step);
    Err(Error::unexpected(file.path(), why))
}

/// Adds the metadata of another shard of the same snapshot.
fn merge(meta: &mut Meta, own: Meta, path: &Path, other: &Path) -> Result<()> {
    let session = |meta: &Meta| meta.session.as_ref().map(ToString::to_string);
    let extensions = |meta: &Meta| serde_json::json!(meta.extensions).to_string();
    for (what, found, expected) in [
        ("the profile", Some(&own.profile), Some(&meta.profile)),
        ("the history", own.history.as_ref(), meta.history.as_ref()),
        ("the run's id", own.run.as_ref(), meta.run.as_ref()),
        ("the writing session", session(&own).as_ref(), session(meta).as_ref()),
        ("the list of extensions", Some(&extensions(&own)), Some(&extensions(meta))),
    ] {
        if found != expected {
            let shown = |text: Option<&String>| text.cloned().unwrap_or_else(|| "none".into());
            return Err(Error::mismatch(path, other, Difference::new(what, shown(expected), shown(found))));
        }
    }
    meta.dtypes.extend(own.dtypes.iter().map(|(name, &dtype)| (name.clone(), dtype)));
    meta.copied.extend(own.copied);
    meta.tied.extend(own.tied);
    Ok(())
}
