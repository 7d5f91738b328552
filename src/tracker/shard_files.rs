//! Files of a sharded run: which of them this process writes, and which it removes.

use std::collections::BTreeSet;
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
        let listed = snapshot::list(&self.dir)?;
        // A state that was saved before the snapshots of its update does not name them. They are never written again.
        let is_set = |id: &SnapshotId, files: &[PathBuf]| files[0].ends_with(id.part_name(1, files.len()));
        let is_newest = |id: &SnapshotId| Some(id.step) == self.settled.last();
        if listed.iter().any(|(id, files)| is_newest(id) && (self.shard.is_some() || is_set(id, files))) {
            self.stored = self.settled.last();
        }
        let Some(shard) = self.shard else { return Ok(()) };
        let steps = listed.into_keys().map(|id| id.step);
        self.kept = steps.filter(|step| self.settled.contains(*step)).collect();
        self.kept.extend(self.stored.filter(|_| self.stored == self.settled.last()));
        self.retain();
        if shard.is_first() {
            // Older states stay until a newer one is complete: other processes have not verified their files yet.
            self.checkpoint_meta(self.stored).drop_files(&list_files(&self.dir)?, &BTreeSet::new())?;
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
            state.run == self.run_id
                && state.session == self.session
                && state.clock == self.clock
                && state.history == self.history
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
        self.drop_files(&files, &self.spared_steps(&files))
    }

    /// Returns the newest steps beyond those of the list that stay, one for each step of the list that was given up: a
    /// disk that was full for long must not displace what is there.
    fn spared_steps(&self, files: &[ListedFile]) -> BTreeSet<u64> {
        let is_step_whole = |step: &u64| {
            let of = |index| FileOf::Snapshot(SnapshotId { index, step: *step });
            (0..self.settings.profiles.len()).all(|index| is_complete(files, of(index)))
        };
        let step_of = |file: &ListedFile| if let FileOf::Snapshot(id) = file.of { Some(id.step) } else { None };
        let steps: BTreeSet<u64> = files.iter().filter_map(step_of).collect();
        let whole: BTreeSet<u64> = steps.into_iter().filter(is_step_whole).collect();
        let given_up = self.kept.difference(&whole).count();
        whole.into_iter().rev().filter(|step| !self.kept.contains(step)).take(given_up).collect()
    }

    /// Returns true if all processes have written their files of this step's snapshots.
    pub(super) fn is_step_complete(&self, files: &[ListedFile]) -> bool {
        let of = |index| FileOf::Snapshot(SnapshotId { index, step: self.step() });
        (0..self.settings.profiles.len()).all(|index| is_complete(files, of(index)))
    }

    fn drop_files(&self, files: &[ListedFile], spared: &BTreeSet<u64>) -> Result<()> {
        self.lock.check()?;
        for ListedFile { of, path, .. } in files {
            let FileOf::Snapshot(id) = *of else { continue };
            let is_listed = self.kept.contains(&id.step) || spared.contains(&id.step);
            let is_surplus = !is_listed && self.history.contains(id.step);
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
            || LiveState::first_document(std::slice::from_ref(&single)).is_ok_and(|state| state.clock < newest);
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
