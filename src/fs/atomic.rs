//! Files that appear whole or not at all: written under a temporary name, synced and renamed, with a sync of the
//! directory.
//!
//! Writeback starts right after each write, while the caller prepares the next one. Leaving it all to the final sync
//! takes about twice as long. Large pages, preallocation and several threads per file gain nothing on top. Writes past
//! the page cache are slower, and some file systems refuse them.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::fail_point::attempt;
use super::file_checks::check_replaceable;
use super::temporary::{TempFile, remove_leftovers};
use crate::error::{Error, Result};

/// Bytes that are written before their writeback starts.
const STRETCH: usize = 4 << 20;

/// Smallest write in bytes that starts writeback. Smaller ones wait for the sync.
const MIN_WRITEBACK: usize = 1 << 20;

/// File that is being written under a temporary name. If it is dropped before [`AtomicFile::commit`], it is removed.
#[derive(Debug)]
pub struct AtomicFile {
    file: TempFile,
    path: PathBuf,
    /// Largest length of a file that this process may write.
    limit: Option<u64>,
}

impl AtomicFile {
    /// Creates a temporary file in the directory of `path`, its final name.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if the directory cannot be written, and as [`check_replaceable`].
    pub fn create(path: &Path) -> Result<AtomicFile> {
        AtomicFile::with_mode(path, 0o666)
    }

    /// Creates a file as [`AtomicFile::create`] does, with no more than the given permissions.
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub(crate) fn create_within(path: &Path, permissions: &Permissions) -> Result<AtomicFile> {
        AtomicFile::with_mode(path, permissions.mode() & 0o666)
    }

    /// Creates a file as [`AtomicFile::create`] does, after it has removed what killed processes left in the directory.
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn create_after_leftovers(path: &Path) -> Result<AtomicFile> {
        remove_leftovers(parent_dir(path));
        AtomicFile::create(path)
    }

    fn with_mode(path: &Path, mode: u32) -> Result<AtomicFile> {
        check_replaceable(path)?;
        // Subject to the umask, as for any new file. The default of tempfile is private to the user.
        let permissions = Permissions::from_mode(mode);
        let file = attempt("write", path, || TempFile::create(parent_dir(path), permissions))?;
        Ok(AtomicFile { file, path: path.to_owned(), limit: file_limit() })
    }

    /// Returns the final path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes bytes at an offset, in any order and from any thread.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), as for a full disk.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        attempt("write", &self.path, || write_within(self.limit, self.file.as_file(), offset, bytes))?;
        start_writeback(self.file.as_file(), offset, bytes.len());
        Ok(())
    }

    /// Writes a large block in pieces, so that writeback starts early.
    ///
    /// # Errors
    /// As [`AtomicFile::write_at`].
    pub fn write_block_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut stretches = bytes.chunks(STRETCH).enumerate();
        stretches.try_for_each(|(i, bytes)| self.write_at(offset + (i * STRETCH) as u64, bytes))
    }

    /// Makes the file durable under its final name and replaces any file or link of that name.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), and as [`check_replaceable`]: writing may have taken hours. The temporary file
    /// is removed, and what has that name is untouched.
    pub fn commit(self) -> Result<()> {
        attempt("sync", &self.path, || self.file.as_file().sync_all())?;
        check_replaceable(&self.path)?;
        attempt("rename into place", &self.path, || self.file.persist(&self.path))?;
        sync_directory(parent_dir(&self.path))
    }
}

/// Returns the largest length of a file that this process may write.
pub(super) fn file_limit() -> Option<u64> {
    getrlimit(Resource::Fsize).current
}

/// Writes bytes at an offset of a file, or fails if they would exceed a limit on its length.
///
/// Without the check, a signal would end the process.
pub(super) fn write_within(limit: Option<u64>, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    if limit.is_some_and(|limit| offset + bytes.len() as u64 > limit) {
        return Err(Errno::FBIG.into());
    }
    file.write_all_at(bytes, offset)
}

/// Starts the writeback of a large range of a file, without waiting for it.
///
/// The advice that pages are no longer needed writes back dirty pages, and almost all of them stay in memory. If it
/// fails, the sync writes them.
#[cfg(target_os = "linux")]
pub(super) fn start_writeback(file: &File, offset: u64, bytes: usize) {
    if bytes < MIN_WRITEBACK {
        return;
    }
    let length = std::num::NonZeroU64::new(bytes as u64);
    let _ = rustix::fs::fadvise(file, offset, length, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
pub(super) fn start_writeback(_: &File, _: u64, _: usize) {}

/// Makes renames and removals in a directory durable.
///
/// Some file systems, such as those of shared folders, cannot sync a directory. There it does nothing.
pub fn sync_directory(dir: &Path) -> Result<()> {
    match attempt("sync", dir, || File::open(dir)?.sync_all()) {
        Err(Error::Io { source, .. }) if is_not_supported(&source) => Ok(()),
        synced => synced,
    }
}

/// Returns true for the errors of file systems that cannot sync a directory.
fn is_not_supported(error: &io::Error) -> bool {
    let numbers = [Errno::INVAL, Errno::BADF, Errno::OPNOTSUPP, Errno::NOTSUP, Errno::NOSYS].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|number| numbers.contains(&number))
}

/// Returns the directory that contains a path.
pub fn parent_dir(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::fail_point::Fault;

    #[test]
    fn file_appears_on_commit_and_leaves_nothing_without_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "before").unwrap();
        let file = AtomicFile::create(&path).unwrap();
        file.write_at(0, b"after!!").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
        drop(file);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

        let file = AtomicFile::create(&path).unwrap();
        let block: Vec<u8> = (0..2 * STRETCH + 5).map(|i| (i % 251) as u8).collect();
        file.write_block_at(3, &block).unwrap();
        file.write_at(0, b"abc").unwrap();
        file.commit().unwrap();
        let written = std::fs::read(&path).unwrap();
        assert!(written.starts_with(b"abc") && written[3..] == block);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn files_have_the_mode_of_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        AtomicFile::create(&ours).unwrap().commit().unwrap();
        File::create(&plain).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    #[test]
    fn file_system_that_cannot_sync_a_directory_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        for code in [Errno::INVAL, Errno::BADF, Errno::OPNOTSUPP, Errno::NOSYS] {
            let _fault = Fault::within(dir.path(), 0..1, code.raw_os_error());
            sync_directory(dir.path()).unwrap();
        }
        for code in [Errno::IO, Errno::NOSPC, Errno::ROFS] {
            let _fault = Fault::within(dir.path(), 0..1, code.raw_os_error());
            assert!(matches!(sync_directory(dir.path()), Err(Error::Io { .. })), "{code}");
        }
    }

    #[test]
    fn missing_directory_is_an_error_with_the_path() {
        let text = AtomicFile::create(Path::new("/nonexistent/x")).unwrap_err().to_string();
        assert!(text.contains("/nonexistent/x") && text.contains("check the path"), "{text}");
    }
}
