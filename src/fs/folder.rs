//! Folders that appear whole or not at all: written under a temporary name and renamed, with a sync of the parent.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::atomic::{parent_dir, sync_directory};
use super::fail_point::attempt;
use super::temporary::{self, TempLock};
use crate::error::{Error, Result, shown};

/// Folder that is being written under a temporary name. If it is dropped before [`AtomicFolder::commit`], it is
/// removed.
pub struct AtomicFolder {
    dir: PathBuf,
    /// Dropped before the parents that were created for it.
    temp: TempDir,
    lock: TempLock,
    created: CreatedDirs,
}

/// Checks that `target` does not exist or is an empty directory.
///
/// # Errors
/// [`Error::Unexpected`] with the name of an entry, and [`Error::Io`].
pub fn check_vacant(target: &Path) -> Result<()> {
    match fs::read_dir(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            Err(Error::unexpected(target, "a file of this name is there: name a new directory"))
        }
        Err(error) => Err(Error::io("list", target)(error)),
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(entry) => {
                let name = entry.map_err(Error::io("list", target))?.file_name();
                let why = format!("the directory is not empty (`{}`): name an empty or a new one", shown(&name));
                Err(Error::unexpected(target, why))
            }
        },
    }
}

impl AtomicFolder {
    /// Creates the missing parents of `target`, and a temporary folder beside it whose name contains `purpose`.
    ///
    /// Removes temporary files there that killed processes left.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Unexpected`] if `target` is a directory that cannot be replaced.
    pub fn create(target: &Path, purpose: &str) -> Result<AtomicFolder> {
        // `target` may be a link, and `.` has no parent.
        let dir =
            target.canonicalize().or_else(|_| std::path::absolute(target)).map_err(Error::io("create", target))?;
        let parent =
            dir.parent().ok_or_else(|| Error::unexpected(target, "this is the root: name a directory in it"))?;
        let created = CreatedDirs::parents(parent)?;
        temporary::remove_leftovers(parent);
        let existing = fs::metadata(&dir).ok();
        let device = fs::metadata(parent).map_err(Error::io("read", parent))?.dev();
        if existing.as_ref().is_some_and(|existing| existing.dev() != device) {
            return Err(Error::unexpected(target, "another file system begins here: name a new directory in it"));
        }
        // A new directory is subject to the umask, as any other.
        let permissions = existing.map_or_else(|| Permissions::from_mode(0o777), |existing| existing.permissions());
        let (temp, lock) = temporary::folder(parent, purpose, permissions).map_err(Error::io("create", target))?;
        Ok(AtomicFolder { dir, temp, lock, created })
    }

    /// Returns the path of the temporary folder, to write to.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Renames the finished folder to its final name.
    ///
    /// # Errors
    /// [`Error::Io`], also if another process has begun to use the directory.
    pub fn commit(self) -> Result<()> {
        // Dropped in reverse order: the created parents last.
        let AtomicFolder { created, lock, temp, dir } = self;
        lock.finish();
        attempt("rename into place", &dir, || fs::rename(temp.path(), &dir))?;
        // It has been renamed, so there is nothing to remove.
        let _ = temp.keep();
        drop(lock);
        created.keep()?;
        sync_directory(parent_dir(&dir))
    }
}

/// Guard of created directories, the outermost first. Unless they are kept, empty ones are removed on drop.
pub struct CreatedDirs(Vec<PathBuf>);

impl CreatedDirs {
    /// Creates a directory and its missing parents.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn parents(dir: &Path) -> Result<CreatedDirs> {
        let mut created = CreatedDirs(Vec::new());
        let is_missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
        let missing: Vec<&Path> = dir.ancestors().take_while(is_missing).collect();
        for path in missing.into_iter().rev() {
            match fs::create_dir(path) {
                Ok(()) => created.0.push(path.to_owned()),
                // Another process was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("create", path)(error)),
            }
        }
        Ok(created)
    }

    /// Keeps the directories and makes them durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn keep(mut self) -> Result<()> {
        std::mem::take(&mut self.0).iter().try_for_each(|path| sync_directory(parent_dir(path)))
    }
}

impl Drop for CreatedDirs {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            // Fails if another process has begun to use the directory.
            let _ = fs::remove_dir(path);
        }
    }
}
