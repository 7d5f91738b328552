//! Going back to an older live state: what the run then keeps, sets aside and brings back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::checkpoint_meta::CheckpointMeta;
use crate::error::{Error, Result, shown};
use crate::fs::{self, replace_by_link, sync_directory};
use crate::run::{LiveState, StateDocument, find};
use crate::snapshot::{
    self, Rewind, STATE_FILE, Session, SetAside, Snapshot, SnapshotId, StoredFile, carry_out, files_of, header_hash,
};

/// Course of a run that goes on from a live state.
pub(super) struct Course {
    /// [`header_hash`] of the state.
    state: String,
    /// True if the run's own live state is another one, which this course did not pass.
    leaves_state: bool,
    /// Names of the files of snapshots that do not belong to the course.
    away: Vec<String>,
    /// Files of snapshots that were set aside and belong to it: their folder, and their name.
    back: Vec<(String, String)>,
    /// Largest number of a session in the run.
    pub sessions: u64,
}

impl Course {
    /// Compares the snapshots and the live state of a run with the state that it goes on from. Changes nothing.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for files of another run, and [`Error::Damaged`] for a snapshot of the course.
    pub(super) fn survey(dir: &Path, saved: &LiveState) -> Result<Course> {
        let state = header_hash(saved.file.path())?.unwrap_or_default();
        let sessions = number(saved.document.session.as_ref());
        let mut course = Course { state, leaves_state: false, away: Vec::new(), back: Vec::new(), sessions };
        course.survey_state(dir, saved)?;
        let mut kept = BTreeSet::new();
        for (id, files) in snapshot::list_each(dir)? {
            if course.keeps(id, files, saved)? {
                kept.insert(id);
            } else {
                course.away.extend(files_of(dir, id)?);
            }
        }
        for folder in snapshot::set_aside(dir)? {
            course.survey_aside(&folder, saved, &mut kept)?;
        }
        Ok(course)
    }

    /// Checks the run's own live state.
    fn survey_state(&mut self, dir: &Path, saved: &LiveState) -> Result<()> {
        let path = dir.join(STATE_FILE);
        match find(&path) {
            Ok(None) => {}
            Ok(Some((_, own))) if own.run != saved.document.run => {
                return Err(other_run(&path, "live state", saved));
            }
            Ok(Some((_, own))) => {
                self.sessions = self.sessions.max(number(own.session.as_ref()));
                self.leaves_state = !saved.document.follows(&own);
            }
            Err(error @ Error::Damaged { .. }) => {
                tracing::warn!("the run's own live state is not used: {error}");
                self.leaves_state = true;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Returns true if a snapshot of the run belongs to the course.
    fn keeps(&mut self, id: SnapshotId, files: Result<Vec<PathBuf>>, saved: &LiveState) -> Result<bool> {
        let may_belong = saved.document.history.contains(id.step);
        let snapshot = match files.and_then(|files| Snapshot::open(id, &files)) {
            Ok(snapshot) => snapshot,
            Err(error) if may_belong => return Err(error),
            Err(error) => {
                tracing::warn!("snapshot {id} of the course that is left is set aside unread: {error}");
                return Ok(false);
            }
        };
        if snapshot.meta.run.as_ref() != Some(&saved.document.run) {
            return Err(other_run(snapshot.path(), "snapshot", saved));
        }
        self.sessions = self.sessions.max(number(snapshot.meta.session.as_ref()));
        saved.document.contains(&snapshot)
    }

    /// Finds the snapshots in a folder that is set aside that belong to the course and that the run lacks.
    fn survey_aside(&mut self, folder: &SetAside, saved: &LiveState, kept: &mut BTreeSet<SnapshotId>) -> Result<()> {
        for (id, files) in snapshot::list_each(&folder.path)? {
            // A file that cannot be read stays aside.
            let Ok(snapshot) = files.and_then(|files| Snapshot::open(id, &files)) else { continue };
            self.sessions = self.sessions.max(number(snapshot.meta.session.as_ref()));
            let is_own = snapshot.meta.run.as_ref() == Some(&saved.document.run);
            if is_own && saved.document.contains(&snapshot).unwrap_or(false) && kept.insert(id) {
                let name = folder.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                self.back.extend(files_of(&folder.path, id)?.into_iter().map(|file| (name.to_owned(), file)));
            }
        }
        Ok(())
    }

    /// Makes this the course of the run, whose live state becomes the one at `path`.
    ///
    /// # Errors
    /// [`Error::Io`]; the run then has either its old course or this one. [`Error::Unexpected`] if the file at `path`
    /// has changed meanwhile.
    pub(super) fn take(&self, dir: &Path, path: &Path) -> Result<()> {
        let own = dir.join(STATE_FILE);
        fs::remove_leftovers(dir);
        if self.away.is_empty() && self.back.is_empty() && !self.leaves_state {
            return self.place_state(&own, path);
        }
        let rewind = Rewind::new(self.state.clone(), self.away.clone(), self.back.clone());
        rewind.write(dir)?;
        if self.leaves_state {
            snapshot::create_aside(dir, &rewind)?;
            let left = rewind.folder(dir).join(STATE_FILE);
            replace_by_link(&own, &left)?;
            sync_directory(&rewind.folder(dir))?;
        }
        self.place_state(&own, path)?;
        if !rewind.counts(dir)? {
            return Err(Error::unexpected(path, "the file was changed while it was read: resume again"));
        }
        let left = self.away.len();
        tracing::info!("{}: {left} files of a course that was left are set aside in {}", shown(dir), rewind.id);
        carry_out(dir, &rewind)
    }

    /// Makes the file at `path` the live state of the run, unless it is already.
    fn place_state(&self, own: &Path, path: &Path) -> Result<()> {
        if header_hash(own)?.as_ref() == Some(&self.state) {
            return Ok(());
        }
        replace_by_link(path, own)?;
        sync_directory(fs::parent_dir(own))
    }
}

impl CheckpointMeta {
    /// Removes what was set aside when the run left a course. Files of other runs stay.
    pub(super) fn remove_left_course(&self) -> Result<()> {
        for folder in snapshot::set_aside(&self.dir)? {
            self.lock.check()?;
            snapshot::remove_set_aside(&folder, |path| {
                let file = StoredFile::open(path);
                let metadata = file.as_ref().map(StoredFile::metadata);
                let run = metadata.ok().and_then(|metadata| metadata.get("run"));
                run.is_none_or(|run| *run == self.run_id)
            })?;
        }
        Ok(())
    }
}

fn number(session: Option<&Session>) -> u64 {
    session.map_or(0, |session| session.number)
}

fn other_run(path: &Path, what: &str, saved: &LiveState) -> Error {
    let StateDocument { run, .. } = &saved.document;
    let why = format!(
        "this {what} belongs to another run than {}, whose run is {run}: name the directory of that run, or a new one",
        shown(saved.file.path())
    );
    Error::unexpected(path, why)
}
