//! Plans in which groups of tensors have targets of their own.

use std::collections::BTreeMap;

use globset::Glob;

use super::Run;
use crate::error::{Error, Result};
use crate::math::Profile;
use crate::planning::{At, Noise, Plan, TensorGroup, with_groups};

impl Run {
    /// Solves for averages in which groups of tensors have targets of their own, such as a decoder.
    ///
    /// A group is a glob of tensor names, and `*` matches every character. Each row of `targets` has the target of all
    /// other tensors, then that of each group. All plans can be synthesized in one pass. Their figures are those of the
    /// worst group, and no error is predicted.
    ///
    /// # Errors
    /// As [`Run::plans_with`], and [`Error::Setting`] for a glob that matches no averaged tensor or one of another
    /// group, and for a row of another length.
    pub fn grouped_plans(
        &self,
        targets: &[Vec<Profile>],
        groups: &[String],
        at: At,
        noise: Noise,
    ) -> Result<Vec<Plan>> {
        let wrong = |row: &&Vec<Profile>| row.len() != groups.len() + 1;
        if let Some(row) = targets.iter().find(wrong) {
            let reason = format!("{} targets for {} groups and the other tensors", row.len(), groups.len());
            return Err(Error::Setting { option: "group", reason });
        }
        let mut distinct: Vec<Profile> = Vec::new();
        for profile in targets.iter().flatten() {
            if !distinct.contains(profile) {
                distinct.push(profile.clone());
            }
        }
        let solved = self.plans_with(&distinct, at, noise)?;
        let Some(at) = solved.first().map(|plan| plan.at) else { return Ok(Vec::new()) };
        let groups = self.tensor_groups(groups, at)?;
        let plan_of = |profile: &Profile| solved.iter().find(|plan| plan.profile == *profile).cloned();
        let join = |row: &Vec<Profile>| {
            let base = plan_of(&row[0])?;
            let parts = groups.iter().zip(&row[1..]).map(|(group, profile)| Some((group, plan_of(profile)?)));
            Some(with_groups(base, parts.collect::<Option<_>>()?))
        };
        targets.iter().map(|row| join(row).ok_or(Error::NoTarget)).collect()
    }

    /// Returns the averaged tensors of each glob.
    fn tensor_groups(&self, globs: &[String], at: u64) -> Result<Vec<TensorGroup>> {
        let averaged = self.averaged_at(at);
        let mut owners: BTreeMap<String, &String> = BTreeMap::new();
        let mut groups = Vec::new();
        for glob in globs {
            let setting = |reason: String| Error::Setting { option: "group", reason };
            let matcher = Glob::new(glob).map_err(|error| setting(error.to_string()))?.compile_matcher();
            let tensors: Vec<String> =
                averaged.iter().filter(|name| *name == glob || matcher.is_match(name)).cloned().collect();
            if tensors.is_empty() {
                return Err(setting(format!("`{glob}` matches no averaged tensor of the run: check its spelling")));
            }
            for name in &tensors {
                if let Some(other) = owners.insert(name.clone(), glob) {
                    return Err(setting(format!("tensor `{name}` is in both `{other}` and `{glob}`: change one")));
                }
            }
            groups.push(TensorGroup { name: glob.clone(), tensors });
        }
        Ok(groups)
    }
}
