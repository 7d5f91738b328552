//! Files and folders of a pass, under temporary names until all of them are complete.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::file_plan::{FilePlan, PlannedIndex};
use crate::checkpoint::auxiliary_files;
use crate::error::{Error, Result};
use crate::fs::{AtomicFile, AtomicFolder, CreatedDirs, Stream, check_output, check_vacant, parent_dir};
use crate::synthesis::OutputFile;

/// Place and metadata of one target.
pub(crate) struct OutputTarget<'a> {
    pub path: &'a Path,
    pub metadata: BTreeMap<String, String>,
}

/// Places of a pass, which appear when they are finished. Dropped before that, they are removed.
pub(crate) struct OpenOutputs {
    /// Files of each target.
    pub files: Vec<Vec<OutputFile>>,
    folders: Vec<AtomicFolder>,
    /// Directories that were made for files, the innermost first, as they are dropped.
    created: Vec<CreatedDirs>,
}

/// Checks that a path is free for a folder or a file.
///
/// # Errors
/// [`Error::Unexpected`].
pub(crate) fn check_path(path: &Path, is_folder: bool) -> Result<()> {
    if !is_folder {
        return check_output(path);
    }
    if is_named_as_file(path) {
        return Err(Error::unexpected(path, "a folder is written, and this names a file: name a folder"));
    }
    check_vacant(path)
}

/// Returns true if a path is that of a file, also where a folder would be written otherwise.
pub(crate) fn is_named_as_file(path: &Path) -> bool {
    Stream::is_named(path) || path.extension().is_some_and(|extension| extension == "safetensors")
}

impl FilePlan {
    /// Creates the folders of targets under temporary names, and the missing parents of files.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Unexpected`].
    pub(crate) fn create(&self, targets: &[OutputTarget<'_>]) -> Result<OpenOutputs> {
        let mut open = OpenOutputs { files: Vec::new(), folders: Vec::new(), created: Vec::new() };
        for OutputTarget { path, metadata } in targets {
            let file = |i: usize, path: PathBuf| OutputFile { path, metadata: self.metadata_of(i, metadata) };
            let planned = self.files.iter().enumerate();
            if self.is_folder {
                let folder = AtomicFolder::create(path, "average")?;
                let files: Vec<OutputFile> =
                    planned.map(|(i, planned)| file(i, folder.path().join(&planned.name))).collect();
                for dir in files.iter().filter_map(|file| file.path.parent()) {
                    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
                }
                open.files.push(files);
                open.folders.push(folder);
            } else {
                open.created.insert(0, CreatedDirs::parents(parent_dir(path))?);
                open.files.push(planned.map(|(i, _)| file(i, path.to_path_buf())).collect());
            }
        }
        Ok(open)
    }

    /// Adds the index and the model's other files to written folders, and gives everything its final name.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Unexpected`].
    pub(crate) fn finish(&self, open: OpenOutputs) -> Result<()> {
        let OpenOutputs { folders, created, .. } = open;
        folders.iter().try_for_each(|folder| self.write_beside(folder.path()))?;
        folders.into_iter().try_for_each(AtomicFolder::commit)?;
        created.into_iter().try_for_each(CreatedDirs::keep)
    }

    /// Writes the index and the model's other files into a folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn write_beside(&self, folder: &Path) -> Result<()> {
        if let Some(PlannedIndex { name, index, permissions }) = &self.index {
            let path = folder.join(name);
            let file = match permissions {
                Some(permissions) => AtomicFile::create_within(&path, permissions)?,
                None => AtomicFile::create(&path)?,
            };
            file.write_at(0, index.to_json().as_bytes())?;
            file.commit()?;
        }
        auxiliary_files::write_all(folder, &self.auxiliary)
    }

    /// Returns the metadata of a file of a target, in which `metadata` replaces the planned ones.
    pub(super) fn metadata_of(&self, file: usize, metadata: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut strings = self.files[file].metadata.clone();
        strings.extend(metadata.clone());
        strings
    }
}
