//! Folders that appear whole or not at all: written beside, renamed, the directory above synced.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::atomic::{parent_dir, sync_directory};
use super::fail_point;
use super::temporary::{self, TempLock};
use crate::error::{Error, Result};

/// A folder that is being written under a temporary name. Dropped before [`AtomicFolder::commit`], it leaves nothing.
pub struct AtomicFolder {
    dir: PathBuf,
    /// Removed before the directories that it may lie in.
    temp: TempDir,
    held: TempLock,
    made: CreatedDirs,
}

/// Checks that a folder can be written to `target`: there is nothing, or an empty directory.
///
/// # Errors
/// [`Error::Unexpected`] with what is there, and [`Error::Io`].
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
                let why = format!("the directory is not empty (`{}`): name an empty or a new one", name.display());
                Err(Error::unexpected(target, why))
            }
        },
    }
}

impl AtomicFolder {
    /// Makes the folder's parents, where they are missing, and beside it a temporary folder; `what` tells what for. What
    /// processes that were killed left there is removed.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Unexpected`] for a directory that cannot be replaced.
    pub fn create(target: &Path, what: &str) -> Result<AtomicFolder> {
        // The folder may be named by a link, and `.` has no parent.
        let absolute = || target.canonicalize().or_else(|_| std::path::absolute(target));
        let dir = absolute().map_err(Error::io("create", target))?;
        let parent =
            dir.parent().ok_or_else(|| Error::unexpected(target, "this is the root: name a directory in it"))?;
        let made = CreatedDirs::parents(parent)?;
        temporary::remove_left(parent);
        let (permissions, there) = match fs::metadata(&dir) {
            Ok(metadata) => (metadata.permissions(), Some(metadata.dev())),
            // The mode that the process's umask gives any new directory.
            Err(_) => (Permissions::from_mode(0o777), None),
        };
        let beside = fs::metadata(parent).map_err(Error::io("read", parent))?.dev();
        if there.is_some_and(|device| device != beside) {
            return Err(Error::unexpected(target, "another file system begins here: name a new directory in it"));
        }
        let temp = temporary::folder(parent, what, permissions);
        let (temp, held) = temp.map_err(Error::io("create", target))?;
        Ok(AtomicFolder { dir, temp, held, made })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Gives the folder, which is whole, its name.
    ///
    /// # Errors
    /// [`Error::Io`], where somebody else has begun to use the directory, too.
    pub fn commit(self) -> Result<()> {
        // Dropped from the last to the first: the directories that it lies in come last.
        let AtomicFolder { made, held, temp, dir } = self;
        held.finish();
        let rename = || fs::rename(temp.path(), &dir);
        fail_point(&dir).and_then(|()| rename()).map_err(Error::io("rename into place", &dir))?;
        // It is no longer there to be removed.
        let _ = temp.keep();
        drop(held);
        made.keep()?;
        sync_directory(parent_dir(&dir))
    }
}

/// Directories that were made, the outermost first. Dropped, they are removed where they are empty.
pub struct CreatedDirs(Vec<PathBuf>);

impl CreatedDirs {
    /// Makes a directory and those above it, where they are missing.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn parents(dir: &Path) -> Result<CreatedDirs> {
        let mut made = CreatedDirs(Vec::new());
        let named = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
        let missing: Vec<&Path> = dir.ancestors().take_while(named).collect();
        for path in missing.into_iter().rev() {
            match fs::create_dir(path) {
                Ok(()) => made.0.push(path.to_owned()),
                // Another process was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("create", path)(error)),
            }
        }
        Ok(made)
    }

    /// Keeps them, durably.
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
            // Not empty where somebody else has begun to use it.
            let _ = fs::remove_dir(path);
        }
    }
}
