//! Live states in files of the caller's, such as the folders of the training's own checkpoints.

use std::path::{Path, PathBuf};

use super::PostHocEma;
use crate::error::{Error, Result};
use crate::fs::{self, check_replaceable, parent_dir, replace_by_link, sync_directory};
use crate::snapshot::{SAVED_STATE_FILE, saved_part_name};

impl PostHocEma {
    /// Stores the live state, whole, in a file of the caller's, from which
    /// [`Options::resume_from`](crate::Options::resume_from) goes on. The run itself does not change.
    ///
    /// `path` names the file. In an existing folder, such as the training's own checkpoint, the file is
    /// `posthoc-ema.safetensors`. It appears whole or not at all, and replaces an earlier one. If the run's own live
    /// state is the same, as right after a snapshot, the file is a hard link to it, or a copy on a file system without
    /// links. Removing either leaves the other.
    ///
    /// In a sharded run, `path` is an existing folder, and each process that stores writes a file of its own there,
    /// such as `posthoc-ema-part-00001-of-00004.safetensors`. The state is whole once all have returned. Save into a
    /// folder that no earlier state is in: files of two states do not resume.
    ///
    /// # Errors
    /// Those of [`PostHocEma::save`], and [`Error::Unexpected`] for a path in the run's own directory, a folder that
    /// does not exist, or something that is not a file. The error of a snapshot that failed in the background, or of an
    /// update with NaN on a device, is returned here too; the file is stored all the same.
    pub fn save_to(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = self.output(path.as_ref())?;
        self.settle()?;
        self.non_finite.check_shared()?;
        // Snapshots come first: the state says which of them are stored.
        let flushed = self.engine.flush();
        let stored = if self.needs_retry { self.history().last() } else { self.stored };
        let meta = self.checkpoint_meta(stored);
        if meta.stores_nothing() {
            return flushed.and_then(|()| self.non_finite.take_error());
        }
        fs::remove_leftovers(parent_dir(&path));
        if meta.is_stored() {
            self.lock.id().check()?;
            replace_by_link(&meta.state_path(), &path)?;
            sync_directory(parent_dir(&path))?;
        } else {
            meta.save_to(&path, &self.engine.values()?.values())?;
        }
        flushed.and_then(|()| self.non_finite.take_error())
    }

    /// Returns the file to write, after checking that it can be.
    fn output(&self, path: &Path) -> Result<PathBuf> {
        let is_folder = path.is_dir();
        if !is_folder && path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(Error::unexpected(path, "this folder does not exist: create it, or name a file"));
        }
        if !is_folder && self.shard.is_some() {
            let why = "a sharded run saves a file of each process: name an existing folder";
            return Err(Error::unexpected(path, why));
        }
        let name = match self.shard {
            Some(shard) => saved_part_name(shard.rank.unwrap_or(0) + 1, shard.ranks),
            None => SAVED_STATE_FILE.to_owned(),
        };
        let path = if is_folder { path.join(name) } else { path.to_owned() };
        if matches!((parent_dir(&path).canonicalize(), self.dir.canonicalize()), (Ok(a), Ok(b)) if a == b) {
            let why = "the run's directory holds nothing but the run: save elsewhere, or without a path into the run";
            return Err(Error::unexpected(&path, why));
        }
        check_replaceable(&path)?;
        Ok(path)
    }
}
