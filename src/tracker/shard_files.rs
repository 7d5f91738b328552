//! Files of a sharded run: which of them this process writes, and which it removes.

use std::path::{Path, PathBuf};

use super::PostHocEma;
use super::checkpoint_meta::CheckpointMeta;
use crate::error::{Error, Result, shown};
use crate::fs::attempt;
use crate::run::{LiveState, Settings};
use crate::snapshot::{self, FileOf, ListedFile, STATE_FILE, SnapshotId, StoredFile, is_complete, list_files};

impl PostHocEma {
    /// Finds the steps whose snapshots a sharded run has. Every process finds the same. The first one removes the files
    /// of all other steps, those of other processes too.
    pub(super) fn find_kept(&mut self) -> Result<()> {
        let Some(shard) = self.shard else { return Ok(()) };
        let steps = snapshot::list(&self.dir)?.into_keys().map(|id| id.step);
        self.kept = steps.filter(|step| self.settled.contains(*step)).collect();
        self.kept.extend(self.stored.filter(|_| self.stored == self.settled.last()));
        self.retain();
        if shard.is_first() {
            let meta = self.checkpoint_meta(self.stored);
            meta.drop_files(&list_files(&self.dir)?)?;
            meta.remove_older_states()?;
        }
        Ok(())
    }

    /// Takes the steps that retention does not keep from the list of a sharded run.
    pub(super) fn retain(&mut self) {
        let Settings { profiles, retention, max_checkpoints, .. } = &self.settings;
        let steps: Vec<u64> = self.kept.iter().copied().collect();
        let first = self.settled.first().unwrap_or(1);
        for step in retention.surplus(profiles, first, &steps, *max_checkpoints) {
            self.kept.remove(&step);
        }
    }
}

impl CheckpointMeta {
    /// Returns true for a process of a sharded run that stores nothing.
    pub(super) fn stores_nothing(&self) -> bool {
        self.shard.is_some_and(|shard| shard.rank.is_none())
    }

    /// Returns true if the live state needs no writing: this process resumed from it, or has written it. A state that
    /// is there is never written again, since a kill could leave files of two sessions.
    pub(super) fn is_state_on_disk(&self, path: &Path) -> bool {
        let is_same = |state: &crate::run::StateDocument| {
            state.run == self.run_id && state.clock == self.clock && state.history == self.history
        };
        self.resumed_at == Some(self.clock)
            || LiveState::first_document(&[path.to_owned()]).is_ok_and(|state| is_same(&state))
    }

    /// Removes the snapshots of a sharded run that retention does not keep, if those of this step are complete.
    ///
    /// The process that ends last finds them so, and removes the files of all. Until then a kill loses nothing.
    pub(super) fn drop_shared_surplus(&self) -> Result<()> {
        let files = list_files(&self.dir)?;
        if self.stores_nothing() || !self.is_step_complete(&files) {
            return Ok(());
        }
        self.drop_files(&files)
    }

    /// Returns true if all processes have written their files of this step's snapshots.
    pub(super) fn is_step_complete(&self, files: &[ListedFile]) -> bool {
        let of = |index| FileOf::Snapshot(SnapshotId { index, step: self.step() });
        (0..self.settings.profiles.len()).all(|index| is_complete(files, of(index)))
    }

    fn drop_files(&self, files: &[ListedFile]) -> Result<()> {
        self.lock.check()?;
        for ListedFile { of, path, .. } in files {
            let FileOf::Snapshot(id) = *of else { continue };
            let is_surplus = !self.kept.contains(&id.step) && self.history.contains(id.step);
            if is_surplus && self.is_own_file(path) {
                snapshot::remove(&self.dir, id, std::slice::from_ref(path))?;
            }
        }
        Ok(())
    }

    /// Returns true for a file of this run; otherwise logs a warning.
    fn is_own_file(&self, path: &Path) -> bool {
        if path.extension().is_some_and(|extension| extension == "json") {
            return true;
        }
        let why = match StoredFile::open(path) {
            Ok(file) if file.metadata().get("run") == Some(&self.run_id) => return true,
            Ok(_) => "it belongs to another run: move it out of the directory".to_owned(),
            // Another process has removed it.
            Err(error) if snapshot::is_gone(&error) => return false,
            Err(error) => error.to_string(),
        };
        tracing::warn!("{}: retention skips this file: {why}", shown(path));
        false
    }

    /// Removes the live states of sharded runs that are older than the newest one, and an older one in a single file.
    ///
    /// Any process removes the files of all: the newer state is complete.
    pub(super) fn remove_older_states(&self) -> Result<()> {
        let files = list_files(&self.dir)?;
        let steps = files.iter().filter_map(|file| if let FileOf::State(step) = file.of { Some(step) } else { None });
        let newest = match self.shard {
            Some(_) => steps.filter(|&step| is_complete(&files, FileOf::State(step))).max(),
            // The state in one file is newer than all.
            None => steps.max().map(|step| step.saturating_add(1)),
        };
        let Some(newest) = newest else { return Ok(()) };
        self.lock.check()?;
        let is_older = |file: &&ListedFile| matches!(file.of, FileOf::State(step) if step < newest);
        let mut older: Vec<PathBuf> = files.iter().filter(is_older).map(|file| file.path.clone()).collect();
        let single = self.dir.join(STATE_FILE);
        let is_single_older =
            || LiveState::first_document(std::slice::from_ref(&single)).is_ok_and(|state| state.clock <= newest);
        if self.shard.is_some() && single.is_file() && is_single_older() {
            older.push(single);
        }
        for path in older {
            match attempt("remove", &path, || std::fs::remove_file(&path)) {
                Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed?,
            }
        }
        Ok(())
    }
}
