//! Files that appear whole or not at all: written beside, synced, renamed, the directory synced.
//!
//! What is written goes on its way to the disk at once, while the next is made: a sync that finds all of it still to be
//! written takes about twice as long altogether. Large pages, sizes known beforehand and several threads on one file gain
//! nothing over that, and writes past the page cache are slower (and some filesystems refuse them).

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use tempfile::NamedTempFile;

use super::fail_point;
use super::temporary::{self, Live};
use crate::error::{Error, Result};

/// Bytes that are written before they are sent on to the disk.
const STRETCH: usize = 4 << 20;

/// Fewer bytes than this wait for more, or for the sync.
const SENT_AT_ONCE: usize = 1 << 20;

/// A file that is being written under a temporary name. Dropped before [`AtomicFile::commit`], it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    file: NamedTempFile,
    path: PathBuf,
    /// The length beyond which this process may write no file.
    limit: Option<u64>,
    /// Dropped after the file.
    _live: Live,
}

impl AtomicFile {
    /// Begins a file that will be called `path`, in the same directory.
    ///
    /// # Errors
    /// [`Error::Io`] where the directory cannot be written, [`Error::Unexpected`] where `path` is a directory itself.
    pub fn create(path: &Path) -> Result<AtomicFile> {
        if path.is_dir() {
            return Err(Error::unexpected(path, "this is a directory: name a file in it"));
        }
        // The mode that the process's umask gives any new file; tempfile's own default is private to the user.
        let permissions = Permissions::from_mode(0o666);
        let make = || temporary::file(parent_dir(path), permissions);
        let (file, live) = fail_point(path).and_then(|()| make()).map_err(Error::io("write", path))?;
        Ok(AtomicFile { file, path: path.to_owned(), limit: file_limit(), _live: live })
    }

    /// What the file will be called.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes bytes at an offset; callers may do so in any order and from several threads.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let write = || {
            check_limit(self.limit, offset + bytes.len() as u64)?;
            self.file.as_file().write_all_at(bytes, offset)
        };
        fail_point(&self.path).and_then(|()| write()).map_err(Error::io("write", &self.path))?;
        if bytes.len() >= SENT_AT_ONCE {
            start_writeback(self.file.as_file(), offset, bytes.len());
        }
        Ok(())
    }

    /// Writes a large block, stretch by stretch.
    ///
    /// # Errors
    /// As [`AtomicFile::write_at`].
    pub fn write_block_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut stretches = bytes.chunks(STRETCH).enumerate();
        stretches.try_for_each(|(i, bytes)| self.write_at(offset + (i * STRETCH) as u64, bytes))
    }

    /// Makes the file durable under its final name, in place of any file of that name.
    ///
    /// # Errors
    /// [`Error::Io`]; the temporary file is then removed and what was there before is untouched.
    pub fn commit(self) -> Result<()> {
        fail_point(&self.path).and_then(|()| self.file.as_file().sync_all()).map_err(Error::io("sync", &self.path))?;
        let rename = || self.file.persist(&self.path).map(drop).map_err(|failed| failed.error);
        fail_point(&self.path).and_then(|()| rename()).map_err(Error::io("rename into place", &self.path))?;
        sync_directory(parent_dir(&self.path))
    }
}

/// The length beyond which this process may write no file.
pub fn file_limit() -> Option<u64> {
    getrlimit(Resource::Fsize).current
}

/// A write beyond the limit would not fail but end the process, by a signal.
pub fn check_limit(limit: Option<u64>, end: u64) -> io::Result<()> {
    match limit {
        Some(limit) if end > limit => Err(Errno::FBIG.into()),
        _ => Ok(()),
    }
}

/// Has the system begin to write a stretch of a file, and does not wait for it.
///
/// This is what "not needed any more" does with pages that are not on disk yet; all but a few stay in memory, for whoever reads
/// the file next. Where it fails, the sync does it all.
#[cfg(target_os = "linux")]
fn start_writeback(file: &File, offset: u64, bytes: usize) {
    let length = std::num::NonZeroU64::new(bytes as u64);
    let _ = rustix::fs::fadvise(file, offset, length, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
fn start_writeback(_: &File, _: u64, _: usize) {}

/// Makes renames and removals in a directory durable.
pub fn sync_directory(dir: &Path) -> Result<()> {
    fail_point(dir).and_then(|()| File::open(dir)).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", dir))
}

/// The directory that a path lies in.
pub fn parent_dir(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_seen_before_the_commit_and_nothing_is_left_without_it() {
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
    fn a_missing_directory_is_an_error_with_the_path() {
        let text = AtomicFile::create(Path::new("/nonexistent/x")).unwrap_err().to_string();
        assert!(text.contains("/nonexistent/x") && text.contains("check the path"), "{text}");
    }
}
