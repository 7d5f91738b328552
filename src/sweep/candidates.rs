//! The files of a sweep: averages that wait for their evaluation, and the best one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::search::{Sweep, Trial};
use crate::error::{Error, Result};
use crate::math::Profile;
use crate::snapshot::{PROFILE, StoredFile};

use crate::fs::{is_temporary, sync_directory};
use crate::planning::Plan;

use crate::planning::profile_json;

/// The name of the best average.
pub(super) const BEST: &str = "best.safetensors";

/// The folder of those that wait, and of all where they are kept.
pub(super) const FOLDER: &str = "candidates";

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
    /// Makes the folder, and removes what a sweep that was killed left in it. What was evaluated before stays.
    pub(super) fn new(dir: &Path, keep_all: bool, evaluated: &[Trial]) -> Result<Files> {
        let files = Files { dir: dir.to_owned(), keep_all };
        let folder = files.folder();
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        remove(&files.dir.join(BESIDE))?;
        files.remove_leftovers(evaluated)?;
        Ok(files)
    }

    fn remove_leftovers(&self, evaluated: &[Trial]) -> Result<()> {
        let folder = self.folder();
        let kept: Vec<String> = evaluated.iter().map(|trial| profile_json(&trial.profile)).collect();
        for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let path = entry.map_err(Error::io("list", &folder))?.path();
            let unfinished = path.file_name().and_then(|name| name.to_str()).is_some_and(is_temporary);
            let waited = || !self.keep_all && candidate(&path).is_some_and(|profile| !kept.contains(&profile));
            if path.is_file() && (unfinished || waited()) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    fn folder(&self) -> PathBuf {
        self.dir.join(FOLDER)
    }

    /// The file of the best average.
    pub(super) fn best(&self) -> PathBuf {
        self.dir.join(BEST)
    }

    /// The files of candidates, named after target and step; a table, which has no name, by its number in the list. Where
    /// the name is another average's, which prints alike, a number follows.
    pub(super) fn candidates(&self, plans: &[Plan], sweep: &Sweep) -> Vec<PathBuf> {
        let mut paths: Vec<PathBuf> = Vec::with_capacity(plans.len());
        for plan in plans {
            let name = name(plan, sweep);
            let numbered = |number: usize| match number {
                1 => format!("{name}.safetensors"),
                _ => format!("{name}-{number}.safetensors"),
            };
            let mut free = (1..).map(|number| self.folder().join(numbered(number)));
            paths.extend(free.find(|path| !paths.contains(path) && is_free(path, &plan.profile)));
        }
        paths
    }

    /// Whether the best average that is stored is this one.
    pub(super) fn holds(&self, profile: &Profile) -> bool {
        stored_profile(&self.best()).as_ref() == Some(&profile_json(profile))
    }

    /// Makes a candidate the best: in one step, so that there is always a whole one. Nothing is done where the evaluation
    /// removed its file.
    pub(super) fn keep(&self, candidate: &Path) -> Result<()> {
        if !candidate.exists() {
            return Ok(());
        }
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

fn name(plan: &Plan, sweep: &Sweep) -> String {
    let target = plan.profile.to_string().replace(' ', "-");
    let number = match plan.profile.family() {
        Some(_) => String::new(),
        None => format!("-{}", 1 + sweep.targets().iter().position(|other| *other == plan.profile).unwrap_or(0)),
    };
    format!("{target}{number}.step-{}", plan.at)
}

/// Whether a path can be written: nothing is there, or this very average.
fn is_free(path: &Path, profile: &Profile) -> bool {
    path.symlink_metadata().is_err() || stored_profile(path).as_ref() == Some(&profile_json(profile))
}

/// The profile of an average that is stored.
fn stored_profile(path: &Path) -> Option<String> {
    StoredFile::open(path).ok()?.metadata().get(PROFILE).cloned()
}

/// The profile of a file that is a sweep's candidate, by its name and what it holds.
fn candidate(path: &Path) -> Option<String> {
    let (target, rest) = path.file_name()?.to_str()?.strip_suffix(".safetensors")?.rsplit_once(".step-")?;
    let stored = stored_profile(path)?;
    let profile: Profile = serde_json::from_str(&stored).ok()?;
    let named = target.starts_with(&profile.to_string().replace(' ', "-"));
    (named && rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')).then_some(stored)
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
