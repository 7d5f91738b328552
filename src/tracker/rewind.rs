//! Going back to an older live state: what the run then keeps, sets aside and brings back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::checkpoint_meta::CheckpointMeta;
use crate::error::{Error, Result, shown};
use crate::fs::{self, replace_by_link, sync_directory};
use crate::run::{LiveState, StateDocument};
use crate::snapshot::{
    self, Rewind, STATE_FILE, Session, SetAside, Snapshot, SnapshotId, StoredFile, carry_out, files_of, header_hash,
    state_part_name,
};

/// Course of a run that goes on from a live state.
pub(super) struct Course {
    /// Files of the state, with their names in the run. The last one is placed last, which decides.
    placed: Vec<(PathBuf, String)>,
    /// [`header_hash`] of the last of them.
    state: String,
    /// True if the run's own live state in one file is another one, which this course did not pass, and is replaced.
    leaves_state: bool,
    /// Names of the files of snapshots and states that do not belong to the course.
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
        let placed = names_in_run(saved);
        let state = placed.last().map(|(path, _)| header_hash(path)).transpose()?.flatten().unwrap_or_default();
        let sessions = number(saved.document.session.as_ref());
        let mut course = Course { placed, state, leaves_state: false, away: Vec::new(), back: Vec::new(), sessions };
        for files in states(dir)? {
            course.survey_state(&files, saved)?;
        }
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

    /// Checks a live state of the run.
    fn survey_state(&mut self, files: &[PathBuf], saved: &LiveState) -> Result<()> {
        let names: Vec<String> = files.iter().filter_map(|file| Some(file.file_name()?.to_str()?.to_owned())).collect();
        let is_left = match LiveState::first_document(files) {
            Ok(own) if own.run != saved.document.run => return Err(other_run(&files[0], "live state", saved)),
            Ok(own) => {
                self.sessions = self.sessions.max(number(own.session.as_ref()));
                !saved.document.follows(&own) || own.clock > saved.document.clock
            }
            Err(error @ Error::Damaged { .. }) => {
                tracing::warn!("a live state of the run is not used: {error}");
                true
            }
            Err(error) => return Err(error),
        };
        let is_placed = names.iter().any(|name| self.placed.iter().any(|(_, placed)| placed == name));
        if is_placed && names == [STATE_FILE] {
            self.leaves_state = is_left;
        } else if is_placed && is_same_update(files, saved) {
            // The run's own files stay: they differ at most in the snapshots that they name.
            self.placed = files.iter().cloned().zip(names).rev().collect();
            self.state = header_hash(&files[0])?.unwrap_or_default();
        } else if is_placed {
            self.check_same(files)?;
        } else if is_left {
            self.away.extend(names);
        }
        Ok(())
    }

    /// Checks that the files of the run are those of the state that has their names. They are never replaced, since a
    /// kill could leave files of both.
    fn check_same(&self, files: &[PathBuf]) -> Result<()> {
        for file in files {
            let placed = self.placed.iter().find(|(_, name)| file.ends_with(name));
            if let Some((from, _)) = placed
                && header_hash(from)? != header_hash(file)?
            {
                let why = format!(
                    "this file of the run's own live state has the name of {}, and is another one: move all files of \
                     this state out of the directory",
                    shown(from)
                );
                return Err(Error::unexpected(file, why));
            }
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
        for files in states(&folder.path)? {
            let session = LiveState::first_document(&files).ok().and_then(|state| state.session);
            self.sessions = self.sessions.max(number(session.as_ref()));
        }
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

    /// Makes this the course of the run, whose live state becomes the one that it goes on from.
    ///
    /// # Errors
    /// [`Error::Io`]; the run then has either its old course or this one. [`Error::Unexpected`] if a file of the state
    /// has changed meanwhile.
    pub(super) fn take(&self, dir: &Path) -> Result<()> {
        let Some((path, name)) = self.placed.last() else { return Ok(()) };
        fs::remove_leftovers(dir);
        if self.away.is_empty() && self.back.is_empty() && !self.leaves_state {
            return self.place_state(dir);
        }
        let rewind = Rewind::new(name.clone(), self.state.clone(), self.away.clone(), self.back.clone());
        rewind.write(dir)?;
        if self.leaves_state {
            snapshot::create_aside(dir, &rewind)?;
            let left = rewind.folder(dir).join(STATE_FILE);
            replace_by_link(&dir.join(STATE_FILE), &left)?;
            sync_directory(&rewind.folder(dir))?;
        }
        self.place_state(dir)?;
        if !rewind.counts(dir)? {
            return Err(Error::unexpected(path, "the file was changed while it was read: resume again"));
        }
        let left = self.away.len();
        tracing::info!("{}: {left} files of a course that was left are set aside in {}", shown(dir), rewind.id);
        carry_out(dir, &rewind)
    }

    /// Makes the files of the state the live state of the run, unless they are already.
    fn place_state(&self, dir: &Path) -> Result<()> {
        for (path, name) in &self.placed {
            let own = dir.join(name);
            if header_hash(&own)? != header_hash(path)? {
                replace_by_link(path, &own)?;
                sync_directory(dir)?;
            }
        }
        Ok(())
    }
}

/// Returns the files of a live state, with their names in a run.
fn names_in_run(saved: &LiveState) -> Vec<(PathBuf, String)> {
    let paths = saved.files().iter().map(|file| file.path().to_owned());
    if !saved.is_sharded() {
        return paths.map(|path| (path, STATE_FILE.to_owned())).collect();
    }
    let (step, count) = (saved.document.clock, saved.files().len());
    let mut placed: Vec<(PathBuf, String)> =
        paths.enumerate().map(|(i, path)| (path, state_part_name(step, i + 1, count))).collect();
    placed.reverse();
    placed
}

/// Lists the live states in a folder: that in one file, and the complete ones of sharded runs.
fn states(dir: &Path) -> Result<Vec<Vec<PathBuf>>> {
    let mut states: Vec<Vec<PathBuf>> = snapshot::list_states(dir)?.into_iter().map(|state| state.files).collect();
    let single = dir.join(STATE_FILE);
    states.extend(single.exists().then(|| vec![single]));
    Ok(states)
}

impl CheckpointMeta {
    /// Removes what was set aside when the run left a course. Files of other runs stay.
    pub(super) fn remove_left_course(&self) -> Result<()> {
        // In a sharded run, the process that writes its snapshot last removes it for all.
        if self.shard.is_some()
            && (snapshot::set_aside(&self.dir)?.is_empty() || !self.is_step_complete(&snapshot::list_files(&self.dir)?))
        {
            return Ok(());
        }
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

/// Returns true if a live state has the averages of the same update of the same session.
fn is_same_update(files: &[PathBuf], saved: &LiveState) -> bool {
    let key = |document: &StateDocument| (document.session.clone(), document.clock, document.history.clone());
    LiveState::first_document(files).is_ok_and(|own| own.session.is_some() && key(&own) == key(&saved.document))
}

fn number(session: Option<&Session>) -> u64 {
    session.map_or(0, |session| session.number)
}

fn other_run(path: &Path, what: &str, saved: &LiveState) -> Error {
    let StateDocument { run, .. } = &saved.document;
    let why = format!(
        "this {what} belongs to another run than {}, whose run is {run}: name the directory of that run, or a new one",
        shown(saved.path())
    );
    Error::unexpected(path, why)
}
