//! Averages of the second run of a joint sweep.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::candidates::SweepDir;
use super::options::SweepOptions;
use crate::error::Result;
use crate::math::Profile;
use crate::planning::{At, Plan};
use crate::run::Run;
use crate::synthesis::Output;

/// Second run, with the folder of its averages. Each stands beside the candidate that it is evaluated with.
pub(super) struct SecondRun<'a> {
    run: &'a Run,
    options: &'a SweepOptions<'a>,
    pub dir: SweepDir,
}

impl<'a> SecondRun<'a> {
    pub(super) fn new(run: &'a Run, options: &'a SweepOptions<'a>, dir: &Path) -> Result<SecondRun<'a>> {
        Ok(SecondRun { run, options, dir: SweepDir::second(dir, options)? })
    }

    /// Returns true if the run makes this average with a relative error of at most 5%.
    pub(super) fn is_reached(&self, profile: &Profile) -> bool {
        self.plans(std::slice::from_ref(profile)).is_ok_and(|plans| plans[0].shortfall.is_none())
    }

    /// Checks the file or folder that goes with a best average, and writes it again if it is not that.
    pub(super) fn ensure_best(&self, profile: &Profile, path: &PathBuf) -> Result<()> {
        if !self.dir.holds(path, profile, &BTreeMap::new()) {
            let written = self.write(std::slice::from_ref(profile), &["best.step-0.safetensors".into()])?;
            self.dir.make_best(&written[0], std::slice::from_ref(path))?;
        }
        Ok(())
    }

    /// Writes the average that goes with each candidate, and returns their paths. Equal ones share their bytes.
    pub(super) fn write(&self, profiles: &[Profile], candidates: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let first = |profile: &Profile| profiles.iter().position(|other| other == profile).unwrap_or(0);
        let is_first = |(i, profile): &(usize, &Profile)| first(profile) == *i;
        let distinct: Vec<Profile> =
            profiles.iter().enumerate().filter(is_first).map(|(_, profile)| profile.clone()).collect();
        let plans = self.plans(&distinct)?;
        let paths: Vec<PathBuf> = candidates.iter().map(|candidate| self.dir.beside(candidate)).collect();
        let outputs: Vec<Output<'_>> =
            plans.iter().map(|plan| Output { plan, path: &paths[first(&plan.profile)] }).collect();
        self.options.observer.synthesizing(plans.len(), self.run.bytes_to_read(&plans));
        self.options.write(self.run, &outputs, self.options.with_form)?;
        for (i, profile) in profiles.iter().enumerate() {
            if first(profile) != i {
                self.dir.link(&paths[first(profile)], &paths[i])?;
            }
        }
        Ok(paths)
    }

    /// Solves for averages at the newest snapshot.
    fn plans(&self, profiles: &[Profile]) -> Result<Vec<Plan>> {
        self.run.plans_with(profiles, At::Latest, self.options.noise)
    }
}
