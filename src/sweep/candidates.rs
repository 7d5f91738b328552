//! Files of a sweep: averages to be evaluated, and the best one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::folders;
use super::options::SweepOptions;
use super::trial::{Metric, Trial};
use crate::error::{Error, Result};
use crate::fs::{is_temporary, replace_by_link, sync_directory};
use crate::math::Profile;
use crate::output::OutputForm;
use crate::planning::{Plan, groups_json, profile_json};
use crate::snapshot::{GROUPS, PROFILE};

/// Folder of all averages, if they are kept.
const KEPT: &str = "candidates";

/// Folder of the averages to be evaluated, if only the best is kept. Whatever a killed sweep left there is removed.
const PENDING: &str = "evaluating";

/// The same folders for averages of the second run.
const SECOND_KEPT: &str = "candidates-with";
const SECOND_PENDING: &str = "evaluating-with";

/// Name of the second run among the parts of a joint sweep.
pub const WITH: &str = "with";

/// Folders of averages.
pub(super) const FOLDERS: [&str; 4] = [KEPT, PENDING, SECOND_KEPT, SECOND_PENDING];

/// Average to be evaluated.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Solved weights.
    pub plan: &'a Plan,
    /// Absolute path of its safetensors file, or of its folder. It exists during its evaluations only, unless all
    /// averages are kept.
    pub path: &'a Path,
    /// Absolute path of the second run's average, in a sweep over two runs.
    pub with: Option<&'a Path>,
    /// Number of the repeat, from 1. An evaluation that draws random numbers should seed them by it: what the seed does
    /// to all lengths alike is then no noise.
    pub repeat: u32,
    /// Number of the job, from 0: of those that run at the same time, each has another one.
    pub job: u32,
}

/// Directory of a sweep and its folder of candidates.
///
/// On drop, candidates that are not kept are removed, and the folder if it is empty.
pub(super) struct SweepDir {
    dir: PathBuf,
    keep_all: bool,
    is_second: bool,
    /// True if averages are folders.
    are_folders: bool,
}

impl SweepDir {
    /// Creates the folder, and removes the leftovers of a killed sweep. Averages with a trial in `evaluated` stay if
    /// that sweep kept all.
    pub(super) fn new(dir: &Path, keep_all: bool, are_folders: bool, evaluated: &[Trial]) -> Result<SweepDir> {
        // Checked first: a sweep that is dropped clears a folder.
        if let Some(link) = FOLDERS.map(|name| dir.join(name)).into_iter().find(|folder| folder.is_symlink()) {
            let why = "a link is here, and a sweep removes files from this folder: replace it by a folder";
            return Err(Error::unexpected(&link, why));
        }
        let sweep_dir = SweepDir { dir: dir.to_owned(), keep_all, is_second: false, are_folders };
        // The second run's target is not in the file.
        let in_file = |trial: &Trial| trial.groups.clone().into_iter().filter(|(name, _)| name != WITH).collect();
        let kept: Vec<String> = evaluated.iter().map(|trial| targets_json(&trial.profile, &in_file(trial))).collect();
        clear(&dir.join(KEPT), |targets| !keep_all && !kept.contains(targets))?;
        clear(&dir.join(PENDING), |_| true)?;
        let folder = sweep_dir.folder();
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        Ok(sweep_dir)
    }

    /// As [`SweepDir::new`], for the averages of the second run. They have the file names of the others.
    pub(super) fn second(dir: &Path, options: &SweepOptions<'_>) -> Result<SweepDir> {
        let are_folders = options.with_form.is_some_and(OutputForm::is_folder);
        let sweep_dir = SweepDir { dir: dir.to_owned(), keep_all: options.keep_all, is_second: true, are_folders };
        clear(&dir.join(SECOND_PENDING), |_| true)?;
        let folder = sweep_dir.folder();
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        Ok(sweep_dir)
    }

    /// Path of the second run's average that goes with a candidate.
    pub(super) fn beside(&self, candidate: &Path) -> PathBuf {
        let name = candidate.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.strip_suffix(extension(false)).unwrap_or(&name);
        self.folder().join(format!("{stem}{}", extension(self.are_folders)))
    }

    fn folder(&self) -> PathBuf {
        self.dir.join(match (self.is_second, self.keep_all) {
            (false, true) => KEPT,
            (false, false) => PENDING,
            (true, true) => SECOND_KEPT,
            (true, false) => SECOND_PENDING,
        })
    }

    /// Path of the best average by a metric. The first one has the plain name.
    pub(super) fn best(&self, metrics: &[Metric], metric: usize) -> PathBuf {
        self.dir.join(best_name(metrics, metric, self.is_second, self.are_folders))
    }

    /// Returns a path for each plan, named after its target and step. A table is named by its number among `targets`.
    ///
    /// A suffix separates averages whose targets print alike.
    pub(super) fn candidates(&self, plans: &[Plan], targets: &[Profile]) -> Vec<PathBuf> {
        let mut paths: Vec<PathBuf> = Vec::with_capacity(plans.len());
        let extension = extension(self.are_folders);
        for plan in plans {
            let name = file_stem(plan, targets);
            let numbered = |number: usize| match number {
                1 => format!("{name}{extension}"),
                _ => format!("{name}-{number}{extension}"),
            };
            let mut names = (1..).map(|number| self.folder().join(numbered(number)));
            paths.extend(names.find(|path| !paths.contains(path) && is_free(path, plan)));
        }
        paths
    }

    /// Returns true if a best average is stored and has these targets.
    pub(super) fn holds(&self, best: &Path, profile: &Profile, groups: &BTreeMap<String, Profile>) -> bool {
        stored_targets(best) == Some(targets_json(profile, groups))
    }

    /// Makes a candidate the best average by one or more metrics. Earlier ones are replaced atomically.
    ///
    /// Does nothing if the evaluation removed the file.
    pub(super) fn make_best(&self, candidate: &Path, best: &[PathBuf]) -> Result<()> {
        let Some((last, others)) = best.split_last().filter(|_| candidate.exists()) else { return Ok(()) };
        best.iter().try_for_each(|best| folders::check_best(best, self.are_folders))?;
        others.iter().try_for_each(|best| self.link(candidate, best))?;
        // The candidate stays if all are kept.
        if self.keep_all {
            self.link(candidate, last)?
        } else {
            folders::rename(candidate, last)?
        }
        sync_directory(&self.dir)
    }

    /// Puts a copy that shares its bytes in the place of an average.
    pub(super) fn link(&self, from: &Path, to: &Path) -> Result<()> {
        if self.are_folders { folders::link(from, to) } else { replace_by_link(from, to) }
    }

    /// Removes a candidate, unless all averages are kept.
    pub(super) fn discard(&self, candidate: &Path) -> Result<()> {
        if self.keep_all { Ok(()) } else { folders::remove(candidate) }
    }
}

/// Returns the name of the best average by a metric, or of the second run's that goes with it.
pub(super) fn best_name(metrics: &[Metric], metric: usize, is_second: bool, are_folders: bool) -> String {
    let with = if is_second { "-with" } else { "" };
    let extension = extension(are_folders);
    match metric {
        0 => format!("best{with}{extension}"),
        _ => format!("best-{}{with}{extension}", metrics[metric].name),
    }
}

/// Returns the extension of averages.
fn extension(are_folders: bool) -> &'static str {
    if are_folders { "" } else { ".safetensors" }
}

/// Returns the name of a candidate's file without extension, such as `sigma_rel-0.05.step-500`.
fn file_stem(plan: &Plan, targets: &[Profile]) -> String {
    let target = plan.profile.to_string().replace(' ', "-");
    let number = match plan.profile.family() {
        Some(_) => String::new(),
        None => format!("-{}", 1 + targets.iter().position(|other| *other == plan.profile).unwrap_or(0)),
    };
    format!("{target}{number}.step-{}", plan.at)
}

/// Returns true if nothing is at a path, or an average of the same targets.
fn is_free(path: &Path, plan: &Plan) -> bool {
    path.symlink_metadata().is_err() || stored_targets(path) == Some(targets_json(&plan.profile, &plan.groups))
}

/// Describes the targets of an average: its profile as JSON, and those of its groups.
fn targets_json(profile: &Profile, groups: &BTreeMap<String, Profile>) -> String {
    let groups = if groups.is_empty() { String::new() } else { groups_json(groups) };
    profile_json(profile) + &groups
}

/// Reads the targets of a stored average, as [`targets_json`] describes them.
fn stored_targets(path: &Path) -> Option<String> {
    let file = folders::open(path)?;
    let groups = file.metadata().get(GROUPS).cloned().unwrap_or_default();
    file.metadata().get(PROFILE).map(|profile| profile.clone() + &groups)
}

/// Reads the targets of a sweep's candidate. Returns `None` if its name does not match its contents.
fn candidate_targets(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.strip_suffix(extension(folders::is_directory(path)))?;
    let (target, rest) = name.rsplit_once(".step-")?;
    let stored = stored_targets(path)?;
    // The profile comes first.
    let profile: Profile = serde_json::Deserializer::from_str(&stored).into_iter().next()?.ok()?;
    // An average of the second run has the name of the other one.
    let is_second = path.parent().is_some_and(|folder| folder.ends_with(SECOND_PENDING));
    let is_named = is_second || target.starts_with(&profile.to_string().replace(' ', "-"));
    (is_named && rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')).then_some(stored)
}

/// Removes the averages that a killed sweep left in its directory to be evaluated.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_pending(dir: &Path) -> Result<()> {
    [PENDING, SECOND_PENDING]
        .into_iter()
        .map(|name| dir.join(name))
        .filter(|folder| !folder.is_symlink())
        .try_for_each(|folder| clear(&folder, |_| true))
}

/// Removes temporary files from a folder, and the candidates whose targets `is_leftover` selects. Removes the folder if
/// nothing else is in it.
fn clear(folder: &Path, is_leftover: impl Fn(&String) -> bool) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io("list", folder))?,
    };
    for entry in entries {
        let path = entry.map_err(Error::io("list", folder))?.path();
        let is_unfinished = path.file_name().and_then(|name| name.to_str()).is_some_and(is_temporary);
        let is_own = path.is_file() || folders::is_directory(&path);
        if is_own && (is_unfinished || candidate_targets(&path).as_ref().is_some_and(&is_leftover)) {
            folders::remove(&path)?;
        }
    }
    // Fails if files are left in the folder.
    let _ = fs::remove_dir(folder);
    Ok(())
}

impl Drop for SweepDir {
    fn drop(&mut self) {
        // After an error, candidates are left that were not evaluated. The next sweep tries again to remove them.
        let _ = clear(&self.folder(), |_| !self.keep_all);
    }
}
