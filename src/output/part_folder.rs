//! Unfinished average that several processes write, in a hidden folder beside its place.
//!
//! The folder `.NAME.parts` holds one folder with a random name, so that a process never takes a later folder for its
//! own. In it are the record of what the parts have in common, the files of the average in `output`, and an empty file
//! `done-K` for each part that is complete. It appears by one rename, and the average leaves it by another.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::SystemTime;

use safetensors::Dtype;

use super::create::check_path;
use super::file_plan::{FilePlan, PlannedFile};
use super::part_record::{PartRecord, PartSource};
use super::place::resolve;
use crate::error::{Error, Result};
use crate::fs::{
    AtomicFile, AtomicFolder, ScratchFolder, Stream, check_replaceable, check_same_file_system, create_mark, discard,
    find_document, is_temporary, move_files, parent_dir, remove_leftovers, rename_into_place, sync_directory,
};
use crate::synthesis::{FileHeader, OutputFile, OutputPart};

/// Ending of the hidden folder's name.
const SUFFIX: &str = ".parts";

/// Name of the record.
const RECORD: &str = "plan.json";

/// Name of the folder of the average, or of its only file.
const OUTPUT: &str = "output";

/// Name of the only file of an average that is not a folder.
const FILE: &str = "average.safetensors";

/// Beginning of the names of the marks of complete parts.
const DONE: &str = "done-";

/// Number of attempts to open or create a folder that other processes create and finish meanwhile.
const ATTEMPTS: usize = 9;

/// Average that is written in parts.
pub(crate) struct PartTarget<'a> {
    pub path: &'a Path,
    pub metadata: BTreeMap<String, String>,
    /// Profile and step, for messages.
    pub label: String,
    /// Sources, which several targets share.
    pub sources: Vec<Rc<PartSource>>,
    /// Weights that this process computed.
    pub weights: Vec<f64>,
}

/// State of an average of which a part is to be written.
pub(super) enum PartState {
    /// The average is complete, and at its place.
    Complete,
    Unfinished(PartFolder),
}

/// Folder of an unfinished average.
pub(super) struct PartFolder {
    /// Hidden folder beside the place of the average.
    outer: PathBuf,
    /// The only folder in it.
    dir: PathBuf,
    target: PathBuf,
    record: PartRecord,
    part: OutputPart,
}

/// Returns true if another process has finished the average, and removed its folder, before this one was done with it.
pub(super) fn is_gone(error: &Error) -> bool {
    let Error::Io { path, source, .. } = error else { return false };
    let in_folder = path.components().any(|name| name.as_os_str().to_string_lossy().ends_with(SUFFIX));
    in_folder && matches!(source.kind(), ErrorKind::NotFound | ErrorKind::StaleNetworkFileHandle)
}

impl FilePlan {
    /// Opens the folder of an unfinished average, or creates it.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if parts before wrote another average there, and for a path that cannot be written in
    /// parts; [`Error::Io`].
    pub(super) fn open_part(
        &self,
        target: &PartTarget<'_>,
        part: OutputPart,
        dtype: Option<Dtype>,
    ) -> Result<PartState> {
        if Stream::is_named(target.path) {
            return Err(Error::unexpected(target.path, "parts write to one file together (--part): name a file"));
        }
        let place = place_of(target.path, self.is_folder)?;
        let name = place.file_name().ok_or_else(|| Error::unexpected(target.path, "name a file or a folder"))?;
        let outer = parent_dir(&place).join(format!(".{}{SUFFIX}", name.to_string_lossy()));
        // A process that was killed after the average was complete left what it was removing.
        remove_leftovers(parent_dir(&place));
        let record = self.record(target, part, dtype)?;
        for _ in 0..ATTEMPTS {
            let Some(dir) = inner(&outer)? else {
                if self.is_complete(target, &place)? {
                    // Fails unless a killed process left it empty.
                    let _ = fs::remove_dir(&outer);
                    return Ok(PartState::Complete);
                }
                check_path(&place, self.is_folder)?;
                if let Some(dir) = self.create_folder(&outer, &place, &record)? {
                    let folder = PartFolder { outer: outer.clone(), dir, target: place.clone(), record, part };
                    // The other parts may have finished between the two looks.
                    if self.is_complete(target, &place)? {
                        folder.remove()?;
                        return Ok(PartState::Complete);
                    }
                    return Ok(PartState::Unfinished(folder));
                }
                continue;
            };
            let path = dir.join(RECORD);
            let Some(bytes) = find_document(&path)? else {
                // It had a record from the beginning, so it is finished, or what is left of it.
                remove(&outer, &dir)?;
                continue;
            };
            let found = PartRecord::parse(&path, &bytes)?;
            let folder = PartFolder { outer: outer.clone(), dir, target: place.clone(), record: found, part };
            if folder.missing()?.is_empty() && !folder.source(self).exists() {
                // The process that finished it was killed before it removed the folder.
                folder.remove()?;
                continue;
            }
            folder.record.check(&record, &outer)?;
            // Another process created it while others finished the average.
            if self.is_complete(target, &place)? {
                folder.remove()?;
                return Ok(PartState::Complete);
            }
            return Ok(PartState::Unfinished(folder));
        }
        Err(Error::unexpected(&outer, "other processes create and finish this folder all the time: wait for them"))
    }

    /// Records what all parts must have in common.
    fn record(&self, target: &PartTarget<'_>, part: OutputPart, dtype: Option<Dtype>) -> Result<PartRecord> {
        let mut settings = vec![
            ("the target".to_owned(), target.label.clone()),
            ("the version of posthoc-ema".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("the dtype".to_owned(), dtype.map_or("the model's".to_owned(), |dtype| dtype.to_string())),
        ];
        for source in &target.sources {
            let value = format!("{} with the fingerprint {}", source.name, source.fingerprint()?);
            settings.push(("their sources".to_owned(), value));
        }
        for (i, file) in self.files.iter().enumerate() {
            let header = self.header(target, i)?;
            let hash = &blake3::hash(&header.bytes).to_hex()[..16];
            let name = if self.is_folder { &file.name } else { FILE };
            let value = format!("{name} of {} bytes with the header {hash}", header.file_len);
            settings.push(("their files".to_owned(), value));
        }
        let beside = self.index.iter().map(|planned| planned.name.clone());
        let beside: Vec<String> =
            beside.chain(self.auxiliary.iter().map(|file| file.path().display().to_string())).collect();
        settings.push(("the files beside the weights".to_owned(), format!("[{}]", beside.join(", "))));
        Ok(PartRecord::new(part, settings, &target.weights))
    }

    fn header(&self, target: &PartTarget<'_>, file: usize) -> Result<FileHeader> {
        self.shards.header(file, &self.metadata_of(file, &target.metadata))
    }

    /// Returns true if the average is at its place: its files have the expected headers and lengths, and are not older
    /// than its sources.
    fn is_complete(&self, target: &PartTarget<'_>, place: &Path) -> Result<bool> {
        let newest = target.sources.iter().flat_map(|source| &source.files).filter_map(modified).max();
        for (i, file) in self.files.iter().enumerate() {
            let path = if self.is_folder { place.join(&file.name) } else { place.to_owned() };
            let Ok(metadata) = fs::metadata(&path) else { return Ok(false) };
            let header = self.header(target, i)?;
            let is_new = modified(&path) >= newest;
            if !is_new || !metadata.is_file() || metadata.len() != header.file_len || !begins_with(&path, &header.bytes)
            {
                return Ok(false);
            }
        }
        Ok(self.index.iter().all(|planned| place.join(&planned.name).is_file()))
    }

    /// Creates the folder with a record and empty files. Returns `None` if another process was faster.
    fn create_folder(&self, outer: &Path, place: &Path, record: &PartRecord) -> Result<Option<PathBuf>> {
        let folder = AtomicFolder::create(outer, "average")?;
        check_same_file_system(place)?;
        let name = folder.path().to_string_lossy();
        let id = name.rsplit('-').next().unwrap_or_default().to_owned();
        let dir = folder.path().join(&id);
        let output = dir.join(OUTPUT);
        fs::create_dir_all(&output).map_err(Error::io("create", &output))?;
        if let Ok(existing) = fs::metadata(place)
            && self.is_folder
        {
            fs::set_permissions(&output, existing.permissions()).map_err(Error::io("create", &output))?;
        }
        for file in self.part_files(&dir, &BTreeMap::new()) {
            let parent = parent_dir(&file.path);
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
            create_mark(&file.path)?;
        }
        let written = AtomicFile::create(&dir.join(RECORD))?;
        let json = serde_json::to_vec(record).map_err(|error| Error::Internal(error.to_string()))?;
        written.write_at(0, &json)?;
        written.commit()?;
        match folder.commit() {
            Ok(()) => Ok(Some(outer.join(id))),
            Err(Error::Io { source, .. })
                if matches!(source.kind(), ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the unfinished files in the folder, with the metadata of a target.
    fn part_files(&self, dir: &Path, metadata: &BTreeMap<String, String>) -> Vec<OutputFile> {
        let file = |(i, planned): (usize, &PlannedFile)| {
            let name = if self.is_folder { &planned.name } else { FILE };
            OutputFile { path: dir.join(OUTPUT).join(name), metadata: self.metadata_of(i, metadata) }
        };
        self.files.iter().enumerate().map(file).collect()
    }
}

impl PartFolder {
    /// Returns the weights that all parts blend with: those of the process that created the folder.
    pub(super) fn weights(&self) -> Vec<f64> {
        self.record.weights()
    }

    /// Returns the files of the average.
    pub(super) fn files(&self, plan: &FilePlan, target: &PartTarget<'_>) -> Vec<OutputFile> {
        plan.part_files(&self.dir, &target.metadata)
    }

    /// Returns true if this part was complete before.
    pub(super) fn is_written(&self) -> Result<bool> {
        Ok(!self.missing()?.contains(&self.part.number()))
    }

    /// Adds what the first part writes beside the weights, and marks the part as complete.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn mark(&self, plan: &FilePlan) -> Result<()> {
        if self.part.number() == 1 && plan.is_folder {
            // Another process may finish the average meanwhile: no temporary file is in the folder that is renamed.
            let beside = ScratchFolder::create(&self.dir)?;
            plan.write_beside(beside.path())?;
            move_files(beside.path(), &self.dir.join(OUTPUT))?;
        }
        create_mark(&self.dir.join(format!("{DONE}{}", self.part.number())))
    }

    /// Gives the average its name if all parts are complete. Returns the parts that are not.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Unexpected`] for a file of another length than planned.
    pub(super) fn finish(&self, plan: &FilePlan, target: &PartTarget<'_>) -> Result<Vec<usize>> {
        let missing = self.missing()?;
        if !missing.is_empty() {
            return Ok(missing);
        }
        for (i, file) in self.files(plan, target).iter().enumerate() {
            let expected = plan.header(target, i)?.file_len;
            // Opening it makes a network file system ask for the length.
            let opened = fs::File::open(&file.path).and_then(|file| file.metadata());
            let found = opened.map_err(Error::io("read", &file.path))?.len();
            if found != expected {
                let why = format!(
                    "this file has {found} bytes after all parts, and not {expected}: check that they wrote to one \
                     file system, remove the folder {SUFFIX} that it is in, and start all parts again"
                );
                return Err(Error::unexpected(&file.path, why));
            }
        }
        sync_directory(&self.dir.join(OUTPUT))?;
        if !plan.is_folder {
            check_replaceable(&self.target)?;
        }
        rename_into_place(&self.source(plan), &self.target)?;
        self.remove()?;
        Ok(Vec::new())
    }

    /// Returns the path of the finished average within the folder.
    fn source(&self, plan: &FilePlan) -> PathBuf {
        let output = self.dir.join(OUTPUT);
        if plan.is_folder { output } else { output.join(FILE) }
    }

    /// Returns the numbers of the parts that are not complete.
    fn missing(&self) -> Result<Vec<usize>> {
        let done: BTreeSet<usize> = entries(&self.dir)?.iter().filter_map(|path| mark_of(path)).collect();
        Ok((1..=self.record.parts).filter(|number| !done.contains(number)).collect())
    }

    /// Removes the folder, at once for other processes.
    fn remove(&self) -> Result<()> {
        remove(&self.outer, &self.dir)
    }
}

/// Removes an inner folder, at once for other processes, and the hidden one if it is empty.
fn remove(outer: &Path, dir: &Path) -> Result<()> {
    discard(dir, parent_dir(outer))?;
    // Fails if another process has created the next one.
    let _ = fs::remove_dir(outer);
    Ok(())
}

/// Returns the place of an average with its parent resolved, and with an existing folder's own links resolved.
fn place_of(path: &Path, is_folder: bool) -> Result<PathBuf> {
    match (is_folder, path.file_name()) {
        (false, Some(name)) => Ok(resolve(parent_dir(path))?.join(name)),
        _ => resolve(path),
    }
}

/// Returns the folder within the hidden one, if there is any.
fn inner(outer: &Path) -> Result<Option<PathBuf>> {
    match entries(outer) {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        entries => Ok(entries?.into_iter().find(|path| path.is_dir() && !is_temporary(name_of(path)))),
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<PathBuf>>>();
    list().map_err(Error::io("list", dir))
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn mark_of(path: &Path) -> Option<usize> {
    name_of(path).strip_prefix(DONE)?.parse().ok()
}

fn modified(path: &PathBuf) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

/// Returns true if a file begins with some bytes.
fn begins_with(path: &Path, bytes: &[u8]) -> bool {
    let mut found = vec![0; bytes.len()];
    fs::File::open(path).and_then(|mut file| file.read_exact(&mut found)).is_ok() && found == bytes
}
