//! The directory that an import writes to: what it may be, and how it is left after an error.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::snapshot::{self, Lock};

/// Checks that a run can be written to `target`, before anything is read.
///
/// # Errors
/// [`Error::Unexpected`] where it is the source, [`Error::RunExists`] where it holds a run.
pub(super) fn check(source: &Path, target: &Path) -> Result<()> {
    let same = matches!((source.canonicalize(), target.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same {
        let why = "the checkpoints are in this very directory, which is left untouched: name another one for the run";
        return Err(Error::unexpected(target, why));
    }
    if target.exists() { snapshot::check_empty(target) } else { Ok(()) }
}

/// A directory that a run is being written to. Dropped before [`Target::keep`], it is as it was before.
pub(super) struct Target<'a> {
    dir: &'a Path,
    /// The directories that were made, the outermost first.
    made: Vec<PathBuf>,
    /// Held from when it is known that there was no run.
    lock: Option<Lock>,
}

impl<'a> Target<'a> {
    /// Makes the directory, where it is missing, and locks it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Locked`], [`Error::RunExists`].
    pub(super) fn open(dir: &'a Path) -> Result<Target<'a>> {
        let mut target = Target { dir, made: Vec::new(), lock: None };
        let missing = dir.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists());
        let missing: Vec<&Path> = missing.collect();
        for path in missing.into_iter().rev() {
            fs::create_dir(path).map_err(Error::io("create", path))?;
            target.made.push(path.to_owned());
        }
        let lock = Lock::acquire(dir)?;
        snapshot::check_empty(dir)?;
        snapshot::remove_leftovers(dir)?;
        target.lock = Some(lock);
        Ok(target)
    }

    /// The run is whole.
    pub(super) fn keep(mut self) {
        self.made.clear();
        self.lock = None;
    }

    /// Every snapshot in the directory is of this import: there was none before, and the lock kept others away.
    fn remove_snapshots(&self) -> Result<()> {
        for (stem, files) in snapshot::list_each(self.dir)? {
            snapshot::remove(self.dir, stem, &files?)?;
        }
        snapshot::remove_leftovers(self.dir)
    }
}

impl Drop for Target<'_> {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take() {
            if let Err(error) = self.remove_snapshots() {
                tracing::warn!(
                    "{}: the snapshots of an import that failed are left there: {error}",
                    self.dir.display()
                );
            }
            if !self.made.is_empty() {
                lock.discard(self.dir);
            }
        }
        for path in self.made.iter().rev() {
            // Not empty where somebody else has begun to use it.
            let _ = fs::remove_dir(path);
        }
    }
}
