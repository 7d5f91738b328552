//! Files that several processes write to at the same time, on any machines that share a file system.
//!
//! Nothing here relies on locks, which are not visible to every machine: only on names that are created once, and on
//! renames.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use tempfile::TempDir;

use super::atomic::{file_limit, parent_dir, start_writeback, sync_directory, write_within};
use super::fail_point::attempt;
use super::file_checks::without_following;
use super::temporary::{self, TempLock};
use crate::error::{Error, Result};

/// Existing file that several processes write to, each its own range.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    path: std::path::PathBuf,
    /// Largest length of a file that this process may write.
    limit: Option<u64>,
}

impl SharedFile {
    /// Opens a file that exists. It is neither created nor cut.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path) -> Result<SharedFile> {
        let open = || without_following(File::options().write(true)).open(path);
        Ok(SharedFile { file: attempt("write", path, open)?, path: path.to_owned(), limit: file_limit() })
    }

    /// Writes bytes at an offset, in any order and from any thread.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        attempt("write", &self.path, || write_within(self.limit, &self.file, offset, bytes))?;
        start_writeback(&self.file, offset, bytes.len());
        Ok(())
    }

    /// Makes the bytes durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(self) -> Result<()> {
        attempt("sync", &self.path, || self.file.sync_all())
    }
}

/// Creates an empty file unless it is there, and makes its name durable.
///
/// # Errors
/// [`Error::Io`].
pub fn create_mark(path: &Path) -> Result<()> {
    attempt("create", path, || match File::create_new(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        created => created.map(drop),
    })?;
    sync_directory(parent_dir(path))
}

/// Renames a file or folder, and makes that durable.
///
/// # Errors
/// [`Error::Io`], which names the new path, or the old one if it is not there.
pub fn rename_into_place(from: &Path, to: &Path) -> Result<()> {
    match attempt("rename into place", to, || fs::rename(from, to)) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Err(Error::io("rename", from)(source))
        }
        renamed => renamed.and_then(|()| sync_directory(parent_dir(to))),
    }
}

/// Moves the files of a folder into another one. Files of the same names are replaced.
///
/// # Errors
/// [`Error::Io`].
pub fn move_files(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Error::io("list", from))? {
        let entry = entry.map_err(Error::io("list", from))?;
        let (path, place) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            // Not its parents: a folder that was renamed meanwhile must not be created again.
            attempt("create", &place, || match fs::create_dir(&place) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                created => created,
            })?;
            move_files(&path, &place)?;
        } else {
            attempt("rename into place", &place, || fs::rename(&path, &place))?;
        }
    }
    sync_directory(to)
}

/// Folder with a temporary name in an existing one. It is removed on drop.
pub struct ScratchFolder {
    temp: TempDir,
    _lock: TempLock,
}

impl ScratchFolder {
    /// Creates a folder in `dir`, and no parents of it: `dir` may have been renamed meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path) -> Result<ScratchFolder> {
        let private = Permissions::from_mode(0o700);
        let created = temporary::folder(dir, "average", private).map_err(Error::io("create", dir));
        created.map(|(temp, lock)| ScratchFolder { temp, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        self.temp.path()
    }
}

/// Removes a folder at once, as other processes see it: it gets a temporary name in `dir` first.
///
/// # Errors
/// [`Error::Io`], unless another process was faster.
pub fn discard(folder: &Path, dir: &Path) -> Result<()> {
    let temp = ScratchFolder::create(dir)?;
    match attempt("remove", folder, || fs::rename(folder, temp.path().join("discarded"))) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => renamed,
    }
}

/// Checks that a folder beside `target` can be renamed to it: that no other file system is mounted there.
///
/// # Errors
/// [`Error::Unexpected`], and [`Error::Io`].
pub fn check_same_file_system(target: &Path) -> Result<()> {
    if !target.exists() {
        return Ok(());
    }
    let parent = parent_dir(target);
    let device = fs::metadata(parent).map_err(Error::io("read", parent))?.dev();
    if fs::metadata(target).is_ok_and(|existing| existing.dev() != device) {
        return Err(Error::unexpected(target, "another file system begins here: name a new directory in it"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_write_ranges_of_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert!(matches!(SharedFile::open(&path), Err(Error::Io { .. })));
        create_mark(&path).unwrap();
        let [first, second] = [(); 2].map(|()| SharedFile::open(&path).unwrap());
        second.write_at(3, b"def").unwrap();
        first.write_at(0, b"abc").unwrap();
        first.sync().unwrap();
        second.sync().unwrap();
        create_mark(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abcdef");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(SharedFile::open(&link).is_err());
    }

    #[test]
    fn moved_and_discarded_folders_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        fs::create_dir_all(from.join("module")).unwrap();
        fs::create_dir(&to).unwrap();
        for name in ["a", "module/b"] {
            fs::write(from.join(name), name).unwrap();
        }
        move_files(&from, &to).unwrap();
        assert_eq!(fs::read(to.join("module/b")).unwrap(), b"module/b");
        discard(&from, dir.path()).unwrap();
        discard(&from, dir.path()).unwrap();
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["to"]);
        let gone = dir.path().join("gone");
        assert!(move_files(&to, &gone).is_err() && !gone.exists());
    }
}
