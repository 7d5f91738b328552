//! The run directory: its listing is the only index of the snapshots in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::STATE_FILE;
use super::meta::Meta;
use super::read::StoredFile;
use super::shards::Index;
use super::tensors::StoredTensor;
use crate::error::{Difference, Error, Result};
use crate::fs::fail_point;
use crate::fs::find_document;
use crate::fs::is_temporary;
use crate::fs::{parent_dir, sync_directory};
use crate::tensor::{compare_tensors, is_averaged};

/// What a snapshot's file names begin with: profile index and step, `0.1000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotId {
    /// The index of the profile within the run.
    pub index: usize,
    /// The step.
    pub step: u64,
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index, self.step)
    }
}

impl SnapshotId {
    /// The name of a snapshot in one file.
    pub fn file_name(self) -> String {
        format!("{self}.safetensors")
    }

    /// The name of shard `i` of `n`, counted from 1.
    pub fn shard_name(self, i: usize, n: usize) -> String {
        format!("{self}-{i:05}-of-{n:05}.safetensors")
    }

    /// The name of the index of shards.
    pub fn index_name(self) -> String {
        format!("{self}.safetensors.index.json")
    }
}

/// A file's part in a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Whole,
    Shard { i: usize, n: usize },
    Index,
}

/// Reads a file name; none for a file that is no part of a snapshot. Only the very names that are written count.
fn parse(name: &str) -> Option<(SnapshotId, Part)> {
    let (stem, part) = if let Some(stem) = name.strip_suffix(".safetensors.index.json") {
        (stem, Part::Index)
    } else {
        let stem = name.strip_suffix(".safetensors")?;
        match stem.split_once('-') {
            None => (stem, Part::Whole),
            Some((stem, shard)) => {
                let (i, n) = shard.split_once("-of-")?;
                (stem, Part::Shard { i: i.parse().ok()?, n: n.parse().ok()? })
            }
        }
    };
    let (index, step) = stem.split_once('.')?;
    let stem = SnapshotId { index: index.parse().ok()?, step: step.parse().ok()? };
    let canonical = match part {
        Part::Whole => stem.file_name(),
        Part::Shard { i, n } => stem.shard_name(i, n),
        Part::Index => stem.index_name(),
    };
    (canonical == name).then_some((stem, part))
}

/// The snapshots of a run and the files of each, without opening them.
///
/// # Errors
/// As [`list_each`], and [`Error::Unexpected`] for a finished set with a shard missing.
pub fn list(dir: &Path) -> Result<BTreeMap<SnapshotId, Vec<PathBuf>>> {
    list_each(dir)?.into_iter().map(|(stem, files)| Ok((stem, files?))).collect()
}

/// The snapshots of a run and the files of each, or why a snapshot is not whole. A set of shards that is incomplete
/// and has no index was never finished: it is left out, with a warning.
///
/// # Errors
/// [`Error::NoRun`] where there is no such directory, [`Error::Io`] where it cannot be read.
pub fn list_each(dir: &Path) -> Result<BTreeMap<SnapshotId, Result<Vec<PathBuf>>>> {
    let mut found: BTreeMap<SnapshotId, Vec<Part>> = BTreeMap::new();
    for name in names(dir)? {
        if let Some((stem, part)) = parse(&name) {
            found.entry(stem).or_default().push(part);
        }
    }
    let mut snapshots = BTreeMap::new();
    for (stem, parts) in found {
        if let Some(files) = complete(dir, stem, &parts).transpose() {
            snapshots.insert(stem, files);
        }
    }
    Ok(snapshots)
}

/// The name of any file in a directory that is part of a snapshot, finished or not.
///
/// # Errors
/// As [`list_each`].
pub fn any_part(dir: &Path) -> Result<Option<String>> {
    Ok(names(dir)?.into_iter().find(|name| parse(name).is_some()))
}

/// Checks that a directory can take a new run: it holds no live state and no part of a snapshot; other files do not matter.
///
/// # Errors
/// [`Error::RunExists`], and as [`list_each`].
pub fn check_empty(dir: &Path) -> Result<()> {
    let state = dir.join(STATE_FILE).exists().then(|| STATE_FILE.to_owned());
    let found = if state.is_some() { state } else { any_part(dir)? };
    match found {
        Some(found) => Err(Error::RunExists { path: dir.to_owned(), found }),
        None => Ok(()),
    }
}

fn complete(dir: &Path, stem: SnapshotId, parts: &[Part]) -> Result<Option<Vec<PathBuf>>> {
    let of = parts.iter().filter_map(|part| if let Part::Shard { n, .. } = part { Some(*n) } else { None }).max();
    // Only as many shards as there are files can be there, whatever a file's name claims.
    let missing = of.and_then(|n| (1..=n).find(|&i| !parts.contains(&Part::Shard { i, n })));
    match (of, missing) {
        (Some(_), None) if parts.contains(&Part::Whole) => {
            let why = "this snapshot is there twice, in one file and in shards: move one of the two out";
            Err(Error::unexpected(&dir.join(stem.file_name()), why))
        }
        _ if parts.contains(&Part::Whole) => Ok(Some(vec![dir.join(stem.file_name())])),
        (Some(n), None) => Ok(Some((1..=n).map(|i| dir.join(stem.shard_name(i, n))).collect())),
        (Some(n), Some(i)) if parts.contains(&Part::Index) => {
            let why = format!("this shard is missing: bring it back, or move all files of snapshot {stem} out");
            Err(Error::unexpected(&dir.join(stem.shard_name(i, n)), why))
        }
        (None, _) => {
            let why = "none of its shards is there: bring them back, or remove it";
            Err(Error::unexpected(&dir.join(stem.index_name()), why))
        }
        _ => {
            tracing::warn!("{}: snapshot {stem} was not written to its end and is left out", dir.display());
            Ok(None)
        }
    }
}

/// The names of all files in a directory, in order.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            let reason = if error.kind() == ErrorKind::NotFound { "it does not exist" } else { "it is no directory" };
            return Err(Error::NoRun { path: dir.to_owned(), reason: reason.into() });
        }
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        // Names that are not UTF-8 are none of ours.
        names.extend(name.into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// Removes what a killed writer left: temporary files and shards of sets that were never finished.
///
/// The caller holds the run's lock.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_leftovers(dir: &Path) -> Result<()> {
    let finished: BTreeSet<PathBuf> = list(dir)?.into_values().flatten().collect();
    for name in names(dir)? {
        let path = dir.join(&name);
        let unfinished = matches!(parse(&name), Some((_, Part::Shard { .. }))) && !finished.contains(&path);
        if path.is_file() && (is_temporary(&name) || unfinished) {
            fail_point(&path).and_then(|()| fs::remove_file(&path)).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Removes a snapshot. Its index goes first: without it the rest is not taken for a damaged set.
///
/// # Errors
/// [`Error::Io`].
pub fn remove(dir: &Path, stem: SnapshotId, files: &[PathBuf]) -> Result<()> {
    let index = dir.join(stem.index_name());
    for path in std::iter::once(&index).chain(files) {
        match fail_point(path).and_then(|()| fs::remove_file(path)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io("remove", path)(error)),
            _ => {}
        }
    }
    sync_directory(dir)
}

/// A snapshot, mapped and checked.
#[derive(Debug)]
pub struct Snapshot {
    /// The index of the profile, and the step.
    pub stem: SnapshotId,
    /// What the snapshot says of itself.
    pub meta: Meta,
    files: Vec<StoredFile>,
    /// Where each tensor is, in order of their names.
    places: Vec<Place>,
}

/// A tensor's file, and its place in the order of names there.
#[derive(Clone, Copy, Debug)]
struct Place {
    file: usize,
    tensor: usize,
}

impl Snapshot {
    /// Opens the files of one snapshot.
    ///
    /// # Errors
    /// Those of [`StoredFile::open`] and [`Meta::from_strings`], and [`Error::Unexpected`] for a file whose name and
    /// contents disagree.
    pub fn open(stem: SnapshotId, paths: &[PathBuf]) -> Result<Snapshot> {
        Snapshot::open_like(stem, paths, None)
    }

    /// As [`Snapshot::open`], sooner where the headers say what those of a sibling say.
    pub(super) fn open_like(stem: SnapshotId, paths: &[PathBuf], sibling: Option<&Snapshot>) -> Result<Snapshot> {
        let like = |i: usize| sibling.and_then(|sibling| sibling.files.get(i));
        let open = |(i, path): (usize, &PathBuf)| StoredFile::open_like(path, like(i));
        let files: Vec<StoredFile> = paths.iter().enumerate().map(open).collect::<Result<_>>()?;
        // Shards tell parts of what the snapshot then says.
        let known = sibling.filter(|sibling| sibling.files.len() == 1);
        let known = known.map(|sibling| (sibling.files[0].metadata(), &sibling.meta));
        let mut meta: Option<Meta> = None;
        for file in &files {
            file.check_header()?;
            let own = Meta::from_strings_like(file.path(), file.metadata(), known)?;
            check_stem(file, stem, &own)?;
            match &mut meta {
                None => meta = Some(own),
                Some(meta) => merge(meta, own, file.path(), files[0].path())?,
            }
        }
        let meta = meta.ok_or_else(|| Error::Internal(format!("snapshot {stem} has no file")))?;
        let snapshot = Snapshot { stem, meta, places: places(&files)?, files };
        let same = |sibling: &Snapshot| snapshot.shares_tensors(sibling) && snapshot.meta.copied == sibling.meta.copied;
        if !sibling.is_some_and(same) {
            snapshot.check_dtypes()?;
        }
        snapshot.check_ties()?;
        Ok(snapshot)
    }

    /// Compares the index of a snapshot in shards with the shards; one that is missing was not written yet.
    ///
    /// # Errors
    /// [`Error::Damaged`] where they differ, [`Error::Io`] where it cannot be read.
    pub fn verify_index(&self) -> Result<()> {
        if self.files.len() == 1 {
            return Ok(());
        }
        let path = parent_dir(self.path()).join(self.stem.index_name());
        let Some(found) = find_document(&path)? else { return Ok(()) };
        let mut index = Index::new(self.stem, self.files.len());
        for (shard, file) in self.files.iter().enumerate() {
            file.tensors().iter().for_each(|(name, tensor)| index.add(shard, name, tensor.range.len()));
        }
        if found != index.text().as_bytes() {
            return Err(Error::damaged(&path, "it does not list the tensors of the shards beside it: remove the file"));
        }
        Ok(())
    }

    /// The first of the snapshot's files, which stands for it in messages.
    pub fn path(&self) -> &Path {
        self.files[0].path()
    }

    /// The snapshot's files.
    pub fn files(&self) -> &[StoredFile] {
        &self.files
    }

    /// Looks at a few elements here and there, and has no others fetched from the disk with them.
    pub(crate) fn sparsely<R>(&self, look: impl FnOnce() -> R) -> R {
        self.files.iter().for_each(|file| file.read_sparsely(true));
        let seen = look();
        self.files.iter().for_each(|file| file.read_sparsely(false));
        seen
    }

    /// Gives back the page tables of what was read, which closing the files would do.
    pub(crate) fn unmap_pages(&self) {
        self.files.iter().for_each(StoredFile::unmap_pages);
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.places.iter().map(|&place| entry(&self.files, place))
    }

    /// A tensor and its bytes.
    pub fn tensor(&self, name: &str) -> Option<(&StoredTensor, &[u8])> {
        self.tensor_near(name, &mut 0)
    }

    /// A tensor and its bytes. Looked for first at a place in the order of names, such as that in a sibling; `place` is then
    /// where it was found.
    pub(crate) fn tensor_near(&self, name: &str, place: &mut usize) -> Option<(&StoredTensor, &[u8])> {
        *place = self.find(name, *place)?;
        let Place { file, tensor } = self.places[*place];
        let tensor = self.files[file].tensors().at(tensor).1;
        Some((tensor, self.files[file].bytes(tensor)))
    }

    fn find(&self, name: &str, near: usize) -> Option<usize> {
        let name_at = |place: &Place| entry(&self.files, *place).0;
        if self.places.get(near).is_some_and(|place| name_at(place) == name) {
            return Some(near);
        }
        self.places.binary_search_by(|place| name_at(place).cmp(name)).ok()
    }

    /// The model's dtype of a tensor, which may be stored in another.
    pub fn model_dtype(&self, name: &str, stored: Dtype) -> Dtype {
        self.meta.dtypes.get(name).copied().unwrap_or(stored)
    }

    /// The size of all files in bytes.
    pub fn len(&self) -> u64 {
        self.files.iter().map(StoredFile::len).sum()
    }

    /// Whether there are no tensors.
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

    /// The first property in which two snapshots of one run must not differ.
    fn difference(&self, other: &Snapshot) -> Option<Difference> {
        if self.meta.run != other.meta.run {
            let id = |snapshot: &Snapshot| snapshot.meta.run.clone().unwrap_or_else(|| "none".into());
            return Some(Difference::new("the run's id", id(other), id(self)));
        }
        if !self.shares_tensors(other)
            && let Some(difference) = compare_tensors(self.model_specs(), other.model_specs())
        {
            return Some(difference);
        }
        if self.meta.tied != other.meta.tied {
            return Some(Difference::new(
                "the list of tied tensors",
                format!("{:?}", other.meta.tied),
                format!("{:?}", self.meta.tied),
            ));
        }
        (self.meta.copied != other.meta.copied).then(|| {
            let (expected, found) = (format!("{:?}", other.meta.copied), format!("{:?}", self.meta.copied));
            Difference::new("the list of copied tensors", expected, found)
        })
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

    /// Whether names, shapes and dtypes are known to be those of a sibling.
    fn shares_tensors(&self, other: &Snapshot) -> bool {
        let pairs = || self.files.iter().zip(&other.files);
        self.files.len() == other.files.len()
            && pairs().all(|(own, its)| own.shares_tensors(its))
            && self.meta.dtypes == other.meta.dtypes
    }

    /// Name, the model's dtype and shape of every tensor.
    fn model_specs(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        self.tensors().map(|(name, stored)| (name, self.model_dtype(name, stored.dtype), stored.shape.as_slice()))
    }

    /// Checks the dtypes that the metadata claim: only an averaged tensor is stored in another dtype than the model's.
    fn check_dtypes(&self) -> Result<()> {
        let mut place = 0;
        for (name, &dtype) in self.meta.dtypes.iter() {
            let stored = self.tensor_near(name, &mut place);
            place += 1;
            let fits = |(stored, _): (&StoredTensor, &[u8])| {
                is_averaged(stored.dtype) && is_averaged(dtype) && !self.meta.copied.contains(name)
            };
            if !stored.is_some_and(fits) {
                let why = format!("the metadata give tensor `{name}` the dtype {dtype}, which cannot be");
                return Err(Error::damaged(self.path(), why));
            }
        }
        Ok(())
    }

    fn check_ties(&self) -> Result<()> {
        let is_there = |name: &str| self.find(name, 0).is_some();
        let odd = |(dropped, kept): &(&String, &String)| !is_there(kept) || is_there(dropped);
        match self.meta.tied.iter().find(odd) {
            Some((dropped, kept)) => {
                let why =
                    format!("the metadata tie `{dropped}` to `{kept}`, of which only the second can and must be there");
                Err(Error::damaged(self.path(), why))
            }
            None => Ok(()),
        }
    }
}

fn entry(files: &[StoredFile], place: Place) -> (&str, &StoredTensor) {
    files[place.file].tensors().at(place.tensor)
}

/// The places of all tensors, in order of their names, none of which may be in two files.
fn places(files: &[StoredFile]) -> Result<Vec<Place>> {
    let of_file =
        |(file, stored): (usize, &StoredFile)| (0..stored.tensors().len()).map(move |tensor| Place { file, tensor });
    let mut places: Vec<Place> = files.iter().enumerate().flat_map(of_file).collect();
    if files.len() > 1 {
        // Stable: of one name the earlier file's comes first.
        places.sort_by_key(|&place| entry(files, place).0);
    }
    let twice = places.windows(2).find(|pair| entry(files, pair[0]).0 == entry(files, pair[1]).0);
    match twice {
        Some(&[_, second]) => {
            let why = format!("tensor `{}` is in another shard too", entry(files, second).0);
            Err(Error::damaged(files[second.file].path(), why))
        }
        _ => Ok(places),
    }
}

fn check_stem(file: &StoredFile, stem: SnapshotId, meta: &Meta) -> Result<()> {
    if meta.step == stem.step {
        return Ok(());
    }
    let why =
        format!("the name says step {}, but the file holds step {}: give it its own name back", stem.step, meta.step);
    Err(Error::unexpected(file.path(), why))
}

/// Adds what another shard of the same snapshot says.
fn merge(meta: &mut Meta, own: Meta, path: &Path, other: &Path) -> Result<()> {
    let mine = [Some(&own.profile), own.history.as_ref(), own.run.as_ref()];
    let its = [Some(&meta.profile), meta.history.as_ref(), meta.run.as_ref()];
    for (what, (mine, its)) in ["the profile", "the history", "the run's id"].into_iter().zip(mine.iter().zip(its)) {
        if *mine != its {
            let shown = |text: Option<&String>| text.cloned().unwrap_or_else(|| "none".into());
            return Err(Error::mismatch(path, other, Difference::new(what, shown(its), shown(*mine))));
        }
    }
    meta.dtypes.extend(own.dtypes.iter().map(|(name, &dtype)| (name.clone(), dtype)));
    meta.copied.extend(own.copied);
    meta.tied.extend(own.tied);
    Ok(())
}

#[cfg(test)]
mod tests;
