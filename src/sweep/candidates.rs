//! The files of a sweep: averages that wait for their evaluation, and the best one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::search::Sweep;
use crate::error::{Error, Result};
use crate::math::Profile;
use crate::snapshot::{PROFILE, StoredFile, remove_leftovers, sync_directory};
use crate::synthesis::{Plan, profile_json};

/// The name of the best average.
const BEST: &str = "best.safetensors";

/// The folder of those that wait, and of all where they are kept.
const FOLDER: &str = "candidates";

/// What the best is called for a moment. It begins as all temporary names do, so that a leftover is known by it.
const BESIDE: &str = ".posthoc-ema-best";

/// An average to be evaluated.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its solved weights.
    pub plan: &'a Plan,
    /// The safetensors file that holds it: an absolute path, there for the length of the evaluation.
    pub path: &'a Path,
}

/// The folders of a sweep.
pub(super) struct Files {
    dir: PathBuf,
    keep_all: bool,
}

impl Files {
    /// Makes the folder, and removes what a sweep that was killed left in it.
    pub(super) fn new(dir: &Path, keep_all: bool) -> Result<Files> {
        let dir = std::path::absolute(dir).map_err(Error::io("read", dir))?;
        let files = Files { dir, keep_all };
        let folder = files.folder();
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        remove_leftovers(&folder)?;
        remove_leftovers(&files.dir)?;
        Ok(files)
    }

    fn folder(&self) -> PathBuf {
        self.dir.join(FOLDER)
    }

    /// The file of the best average.
    pub(super) fn best(&self) -> PathBuf {
        self.dir.join(BEST)
    }

    /// The file of a candidate, named after target and step; a table, which has no name, by its number in the list.
    pub(super) fn candidate(&self, plan: &Plan, sweep: &Sweep) -> PathBuf {
        let target = plan.profile.to_string().replace(' ', "-");
        let number = match plan.profile.family() {
            Some(_) => String::new(),
            None => format!("-{}", 1 + sweep.targets().iter().position(|other| *other == plan.profile).unwrap_or(0)),
        };
        self.folder().join(format!("{target}{number}.step-{}.safetensors", plan.at))
    }

    /// Whether the best average that is stored is this one.
    pub(super) fn holds(&self, profile: &Profile) -> bool {
        let stored = StoredFile::open(&self.best());
        stored.is_ok_and(|file| file.metadata().get(PROFILE) == Some(&profile_json(profile)))
    }

    /// Makes a candidate the best: in one step, so that there is always a whole one.
    pub(super) fn keep(&self, candidate: &Path) -> Result<()> {
        let best = self.best();
        if self.keep_all {
            self.replace_by_copy(&best, candidate)?;
        } else {
            fs::rename(candidate, &best).map_err(Error::io("rename into place", &best))?;
        }
        sync_directory(&self.dir)
    }

    /// Gives a candidate's bytes a second name, or copies them where the file system has no such thing.
    fn replace_by_copy(&self, best: &Path, candidate: &Path) -> Result<()> {
        let beside = self.dir.join(BESIDE);
        // Left where both names were those of one file, for which a rename does nothing.
        remove(&beside)?;
        let copied = fs::hard_link(candidate, &beside).or_else(|_| fs::copy(candidate, &beside).map(drop));
        let synced = copied.and_then(|()| fs::File::open(&beside)?.sync_all());
        synced.map_err(Error::io("write", best))?;
        fs::rename(&beside, best).map_err(Error::io("rename into place", best))?;
        remove(&beside)
    }

    /// Removes a candidate, unless all are kept.
    pub(super) fn discard(&self, candidate: &Path) -> Result<()> {
        if self.keep_all { Ok(()) } else { remove(candidate) }
    }
}

/// Removes a file; one that is not there is no error.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The folder goes where nothing is left in it.
impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.folder());
    }
}
