//! Run of an import: a folder that appears whole, with the files of each snapshot.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::ImportReport;
use crate::error::{Error, Result};
use crate::fs::AtomicFolder;
use crate::math::Profile;
use crate::run::Run;
use crate::snapshot::{Fill, Meta, SHARD_SIZE, SnapshotId, new_run_id, write_snapshot};
use crate::tensor::TensorSpec;

/// Run that is being written, under a hidden name.
pub(super) struct NewRun {
    target: AtomicFolder,
    id: String,
    written: Vec<SnapshotId>,
    bytes: u64,
}

impl NewRun {
    /// Creates the folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn create(dir: &Path) -> Result<NewRun> {
        let target = AtomicFolder::create(dir, "import")?;
        Ok(NewRun { target, id: new_run_id(), written: Vec::new(), bytes: 0 })
    }

    /// Writes one snapshot. `meta` is given the run's id.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn add(&mut self, id: SnapshotId, specs: Vec<TensorSpec>, meta: Meta, fill: &Fill<'_>) -> Result<()> {
        let meta = Meta { run: Some(self.id.clone()), ..meta };
        for path in write_snapshot(self.target.path(), id, specs, &meta, SHARD_SIZE, fill)? {
            self.bytes += fs::metadata(&path).map_err(Error::io("read", &path))?.len();
        }
        self.written.push(id);
        Ok(())
    }

    /// Makes a reader's checks across the files, and moves the run to its name.
    ///
    /// # Errors
    /// [`Error::Io`], and as [`Run::open`].
    pub(super) fn finish(self, profiles: &[Profile], warnings: Vec<String>) -> Result<ImportReport> {
        Run::open(self.target.path())?;
        self.target.commit()?;
        let steps: BTreeSet<u64> = self.written.iter().map(|id| id.step).collect();
        Ok(ImportReport {
            snapshots: self.written.len(),
            steps: steps.into_iter().collect(),
            profiles: profiles.to_vec(),
            bytes: self.bytes,
            warnings,
        })
    }
}
