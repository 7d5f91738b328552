//! The directory that an import writes to: a run appears there whole, or nothing does.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{Error, Result};
use crate::snapshot::{check_empty, sync_directory};

/// How the directory's name begins as long as the run is not whole.
const PREFIX: &str = ".posthoc-ema-import-";

/// Checks that a run can be written to `target`, before anything is read.
///
/// # Errors
/// [`Error::Unexpected`] where it is the source, or holds other files, [`Error::RunExists`] where it holds a run.
pub(super) fn check(source: &Path, target: &Path) -> Result<()> {
    let same = matches!((source.canonicalize(), target.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same {
        let why = "the checkpoints are in this very directory, which is left untouched: name another one for the run";
        return Err(Error::unexpected(target, why));
    }
    if !target.exists() {
        return Ok(());
    }
    check_empty(target)?;
    match fs::read_dir(target).map_err(Error::io("list", target))?.next() {
        None => Ok(()),
        Some(entry) => {
            let name = entry.map_err(Error::io("list", target))?.file_name();
            let why = format!("the directory is not empty (`{}`): name an empty or a new one", name.display());
            Err(Error::unexpected(target, why))
        }
    }
}

/// A run that is being written beside its directory. Dropped before [`Target::keep`], it leaves nothing.
pub(super) struct Target {
    dir: PathBuf,
    /// Removed before the directories that it may lie in.
    temp: TempDir,
    made: Made,
}

impl Target {
    /// Makes the directory's parents, where they are missing, and a temporary directory beside it.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Unexpected`] for a directory that cannot be replaced.
    pub(super) fn open(target: &Path) -> Result<Target> {
        // A run may be named by a link, and `.` has no parent.
        let absolute = || target.canonicalize().or_else(|_| std::path::absolute(target));
        let dir = absolute().map_err(Error::io("create", target))?;
        let parent =
            dir.parent().ok_or_else(|| Error::unexpected(target, "this is the root: name a directory in it"))?;
        let made = Made::parents(parent)?;
        let (permissions, there) = match fs::metadata(&dir) {
            Ok(metadata) => (metadata.permissions(), Some(metadata.dev())),
            // The mode that the process's umask gives any new directory.
            Err(_) => (Permissions::from_mode(0o777), None),
        };
        let beside = fs::metadata(parent).map_err(Error::io("read", parent))?.dev();
        if there.is_some_and(|device| device != beside) {
            return Err(Error::unexpected(target, "another file system begins here: name a new directory in it"));
        }
        let temp = tempfile::Builder::new().prefix(PREFIX).permissions(permissions).tempdir_in(parent);
        let temp = temp.map_err(Error::io("create", target))?;
        Ok(Target { dir, temp, made })
    }

    /// Where to write.
    pub(super) fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Gives the run, which is whole, its name.
    ///
    /// # Errors
    /// [`Error::Io`], where somebody else has begun to use the directory, too.
    pub(super) fn keep(self) -> Result<()> {
        let Target { dir, temp, mut made } = self;
        fs::rename(temp.path(), &dir).map_err(Error::io("rename into place", &dir))?;
        // It is no longer there to be removed.
        let _ = temp.keep();
        let made = std::mem::take(&mut made.0);
        made.iter().chain([&dir]).filter_map(|path| path.parent()).try_for_each(sync_directory)
    }
}

/// Directories that were made, the outermost first. Dropped, they are removed.
struct Made(Vec<PathBuf>);

impl Made {
    fn parents(dir: &Path) -> Result<Made> {
        let mut made = Made(Vec::new());
        let missing: Vec<&Path> = dir.ancestors().take_while(|path| !path.exists()).collect();
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
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            // Not empty where somebody else has begun to use it.
            let _ = fs::remove_dir(path);
        }
    }
}
