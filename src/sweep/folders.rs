//! Averages of a sweep that are folders: found, linked, replaced and removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::fs::{AtomicFolder, check_replaceable, replace_by_link};
use crate::snapshot::{PROFILE, StoredFile};

/// Opens the file of an average. For a folder, it is the first file of weights with a profile.
pub(super) fn open(path: &Path) -> Option<StoredFile> {
    if !path.is_dir() {
        return StoredFile::open(path).ok();
    }
    let mut files: Vec<PathBuf> = fs::read_dir(path).ok()?.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    let mut opened = files.iter().filter_map(|file| StoredFile::open(file).ok());
    opened.find(|file| file.metadata().contains_key(PROFILE))
}

/// Checks that a best average may be replaced: that nothing is there, a file, or the folder of an average.
///
/// # Errors
/// [`Error::Unexpected`].
pub(super) fn check_best(path: &Path, is_folder: bool) -> Result<()> {
    let is_average = || is_directory(path) && open(path).is_some();
    if !is_folder {
        return check_replaceable(path);
    }
    if path.symlink_metadata().is_err() || is_average() {
        return Ok(());
    }
    Err(Error::unexpected(path, "this is not the folder of an average, which a sweep would replace: move it away"))
}

/// Makes a copy of a folder whose files are links to the same data, in the place of an earlier average.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn link(from: &Path, to: &Path) -> Result<()> {
    remove(to)?;
    let folder = AtomicFolder::create(to, "link")?;
    link_files(from, folder.path())?;
    folder.commit()
}

fn link_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io("create", to))?;
    for entry in fs::read_dir(from).map_err(Error::io("list", from))? {
        let path = entry.map_err(Error::io("list", from))?.path();
        let to = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() { link_files(&path, &to)? } else { replace_by_link(&path, &to)? }
    }
    Ok(())
}

/// Renames a folder in the place of an earlier average.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    // The name of a folder that is not empty cannot be taken over. A sweep that ends here writes its best again.
    if is_directory(to) {
        remove(to)?;
    }
    fs::rename(from, to).map_err(Error::io("rename into place", to))
}

/// Removes a file or a folder if it exists.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn remove(path: &Path) -> Result<()> {
    let removed = if is_directory(path) { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Returns true for a directory that is not a link.
pub(super) fn is_directory(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir())
}
