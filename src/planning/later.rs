//! Plans of tensors whose averages began after the run did.

use super::no_prediction::NoPrediction;
use super::noise::Noise;
use super::plan::{At, LaterTensors, Plan, solve};
use super::shortfall::Shortfall;
use super::source::IndexedSource;
use crate::error::Result;
use crate::math::{History, Profile};

/// Tensors whose averages began with one extension of a run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LaterGroup {
    /// Number of the extension, from 1.
    pub extension: usize,
    /// Step of the extension.
    pub since: u64,
    /// Names of the averaged tensors.
    pub tensors: Vec<String>,
}

/// Solves the same targets for the tensors that began later, and adds the weights to the plans.
///
/// # Errors
/// As [`solve`].
pub(crate) fn solve_later(
    plans: &mut [Plan],
    groups: &[LaterGroup],
    sources: &[IndexedSource],
    history: &History,
    noise: Noise,
) -> Result<()> {
    let Some(at) = plans.first().map(|plan| plan.at) else { return Ok(()) };
    let profiles: Vec<Profile> = plans.iter().map(|plan| plan.profile.clone()).collect();
    for group in groups {
        let has_tensors = |source: &&IndexedSource| source.extensions >= group.extension;
        let sources: Vec<IndexedSource> = sources.iter().filter(has_tensors).cloned().collect();
        let unasked = Err(NoPrediction::NotAsked);
        let solved = solve(&sources, Some(&history.since(group.since)), &profiles, At::Step(at), noise, unasked)?;
        for (plan, Plan { relative_error, noise_gain, weights, shortfall, .. }) in plans.iter_mut().zip(solved) {
            let LaterGroup { since, tensors, .. } = group.clone();
            if let (None, Some(reason)) = (&plan.shortfall, shortfall) {
                let reason = Box::new(reason);
                plan.shortfall = Some(Shortfall::Later { since, tensors: tensors.len(), relative_error, reason });
            }
            plan.later.push(LaterTensors { since, tensors, relative_error, noise_gain, weights });
        }
    }
    Ok(())
}
