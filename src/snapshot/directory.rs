//! The run directory: its listing is the only index of the snapshots in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::STATE_FILE;
use super::atomic::{is_leftover, sync_directory};
use super::meta::Meta;
use super::read::{StoredFile, StoredTensor};
use crate::error::{Error, Result};
use crate::tensor::is_averaged;

/// What a snapshot's file names begin with: profile index and step, `0.1000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stem {
    /// The index of the profile within the run.
    pub index: usize,
    /// The step.
    pub step: u64,
}

impl fmt::Display for Stem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index, self.step)
    }
}

impl Stem {
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
fn parse(name: &str) -> Option<(Stem, Part)> {
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
    let stem = Stem { index: index.parse().ok()?, step: step.parse().ok()? };
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
pub fn list(dir: &Path) -> Result<BTreeMap<Stem, Vec<PathBuf>>> {
    list_each(dir)?.into_iter().map(|(stem, files)| Ok((stem, files?))).collect()
}

/// The snapshots of a run and the files of each, or why a snapshot is not whole. A set of shards that is incomplete
/// and has no index was never finished: it is left out, with a warning.
///
/// # Errors
/// [`Error::NoRun`] where there is no such directory, [`Error::Io`] where it cannot be read.
pub fn list_each(dir: &Path) -> Result<BTreeMap<Stem, Result<Vec<PathBuf>>>> {
    let mut found: BTreeMap<Stem, Vec<Part>> = BTreeMap::new();
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

fn complete(dir: &Path, stem: Stem, parts: &[Part]) -> Result<Option<Vec<PathBuf>>> {
    if parts.contains(&Part::Whole) {
        return Ok(Some(vec![dir.join(stem.file_name())]));
    }
    let of = parts.iter().filter_map(|part| if let Part::Shard { n, .. } = part { Some(*n) } else { None }).max();
    // Only as many shards as there are files can be there, whatever a file's name claims.
    let missing = of.and_then(|n| (1..=n).find(|&i| !parts.contains(&Part::Shard { i, n })));
    match (of, missing) {
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
        if path.is_file() && (is_leftover(&name) || unfinished) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Removes a snapshot. Its index goes first: without it the rest is not taken for a damaged set.
///
/// # Errors
/// [`Error::Io`].
pub fn remove(dir: &Path, stem: Stem, files: &[PathBuf]) -> Result<()> {
    let index = dir.join(stem.index_name());
    for path in std::iter::once(&index).chain(files) {
        match fs::remove_file(path) {
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
    pub stem: Stem,
    /// What the snapshot says of itself.
    pub meta: Meta,
    files: Vec<StoredFile>,
    /// Which file holds each tensor.
    places: BTreeMap<String, usize>,
}

impl Snapshot {
    /// Opens the files of one snapshot.
    ///
    /// # Errors
    /// Those of [`StoredFile::open`] and [`Meta::from_strings`], and [`Error::Unexpected`] for a file whose name and
    /// contents disagree.
    pub fn open(stem: Stem, paths: &[PathBuf]) -> Result<Snapshot> {
        let files: Vec<StoredFile> = paths.iter().map(|path| StoredFile::open(path)).collect::<Result<_>>()?;
        let mut meta: Option<Meta> = None;
        let mut places = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            let own = Meta::from_strings(file.path(), file.metadata())?;
            check_stem(file, stem, &own)?;
            for name in file.tensors().keys() {
                if places.insert(name.clone(), i).is_some() {
                    return Err(Error::damaged(file.path(), format!("tensor `{name}` is in another shard too")));
                }
            }
            match &mut meta {
                None => meta = Some(own),
                Some(meta) => merge(meta, own, file.path(), files[0].path())?,
            }
        }
        let meta = meta.ok_or_else(|| Error::Nothing(format!("snapshot {stem} has no file")))?;
        check_dtypes(&files, &meta)?;
        let odd = |(dropped, kept): &(&String, &String)| !places.contains_key(*kept) || places.contains_key(*dropped);
        if let Some((dropped, kept)) = meta.tied.iter().find(odd) {
            let why =
                format!("the metadata tie `{dropped}` to `{kept}`, of which only the second can and must be there");
            return Err(Error::damaged(files[0].path(), why));
        }
        Ok(Snapshot { stem, meta, files, places })
    }

    /// The first of the snapshot's files, which stands for it in messages.
    pub fn path(&self) -> &Path {
        self.files[0].path()
    }

    /// The snapshot's files.
    pub fn files(&self) -> &[StoredFile] {
        &self.files
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.places.iter().map(|(name, &i)| (name.as_str(), &self.files[i].tensors()[name]))
    }

    /// A tensor and its bytes.
    pub fn tensor(&self, name: &str) -> Option<(&StoredTensor, &[u8])> {
        let file = &self.files[*self.places.get(name)?];
        let tensor = file.tensors().get(name)?;
        Some((tensor, file.bytes(tensor)))
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
        let differs = |reason: String| {
            Err(Error::Mismatch { path: self.path().to_owned(), other: other.path().to_owned(), reason })
        };
        if self.meta.run != other.meta.run {
            let name = |run: &Option<String>| run.clone().unwrap_or_else(|| "none".into());
            return differs(format!(
                "another run's id is stored ({}, not {})",
                name(&self.meta.run),
                name(&other.meta.run)
            ));
        }
        for (name, tensor) in self.tensors() {
            let Some((sibling, _)) = other.tensor(name) else {
                return differs(format!("a tensor `{name}` more is stored"));
            };
            if tensor.shape != sibling.shape {
                return differs(format!(
                    "tensor `{name}` has another shape ({:?}, not {:?})",
                    tensor.shape, sibling.shape
                ));
            }
            let (own, its) = (self.model_dtype(name, tensor.dtype), other.model_dtype(name, sibling.dtype));
            if own != its {
                return differs(format!("tensor `{name}` has another dtype ({own}, not {its})"));
            }
        }
        if let Some((name, _)) = other.tensors().find(|(name, _)| !self.places.contains_key(*name)) {
            return differs(format!("a tensor `{name}` less is stored"));
        }
        if self.meta.tied != other.meta.tied {
            return differs("other tensors are tied".into());
        }
        if self.meta.copied != other.meta.copied {
            return differs("other tensors are copied instead of averaged".into());
        }
        Ok(())
    }
}

/// Checks the dtypes that the metadata claim: only an averaged tensor is stored in another dtype than the model's.
fn check_dtypes(files: &[StoredFile], meta: &Meta) -> Result<()> {
    for (name, &dtype) in &meta.dtypes {
        let stored = files.iter().find_map(|file| file.tensors().get(name));
        let fits =
            |stored: &StoredTensor| is_averaged(stored.dtype) && is_averaged(dtype) && !meta.copied.contains(name);
        if !stored.is_some_and(fits) {
            let why = format!("the metadata give tensor `{name}` the dtype {dtype}, which cannot be");
            return Err(Error::damaged(files[0].path(), why));
        }
    }
    Ok(())
}

fn check_stem(file: &StoredFile, stem: Stem, meta: &Meta) -> Result<()> {
    if meta.step == stem.step {
        return Ok(());
    }
    let why =
        format!("the name says step {}, but the file holds step {}: give it its own name back", stem.step, meta.step);
    Err(Error::unexpected(file.path(), why))
}

/// Adds what another shard of the same snapshot says.
fn merge(meta: &mut Meta, own: Meta, path: &Path, other: &Path) -> Result<()> {
    let same = own.profile == meta.profile && own.history == meta.history && own.run == meta.run;
    if !same {
        let reason = "another profile, history or run is stored".into();
        return Err(Error::Mismatch { path: path.to_owned(), other: other.to_owned(), reason });
    }
    meta.dtypes.extend(own.dtypes);
    meta.copied.extend(own.copied);
    meta.tied.extend(own.tied);
    Ok(())
}

/// Opens all snapshots of a run, in order of profile and step, and checks that they belong together.
///
/// # Errors
/// [`Error::NoRun`] where there is none; those of [`Snapshot::open`] and [`Snapshot::check_sibling`].
pub fn open_all(dir: &Path) -> Result<Vec<Snapshot>> {
    // A tracker beside this reader may drop a snapshot between the listing and the opening: then the listing is old.
    for _ in 0..9 {
        match try_open_all(dir) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            result => return result,
        }
    }
    try_open_all(dir)
}

fn try_open_all(dir: &Path) -> Result<Vec<Snapshot>> {
    let snapshots: Vec<Snapshot> =
        list(dir)?.iter().map(|(&stem, paths)| Snapshot::open(stem, paths)).collect::<Result<_>>()?;
    let Some(first) = snapshots.first() else {
        let reason = "there is no snapshot in it".to_owned();
        return Err(Error::NoRun { path: dir.to_owned(), reason });
    };
    let mut profiles: BTreeMap<usize, &Snapshot> = BTreeMap::new();
    for snapshot in &snapshots {
        snapshot.check_sibling(first)?;
        let of_profile = profiles.entry(snapshot.stem.index).or_insert(snapshot);
        if snapshot.meta.profile != of_profile.meta.profile {
            return Err(Error::Mismatch {
                path: snapshot.path().to_owned(),
                other: of_profile.path().to_owned(),
                reason: format!(
                    "another profile is stored ({}, not {})",
                    snapshot.meta.profile, of_profile.meta.profile
                ),
            });
        }
    }
    Ok(snapshots)
}

#[cfg(test)]
mod tests;
