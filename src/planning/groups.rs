//! Plans in which groups of tensors have targets of their own.

use std::collections::{BTreeMap, BTreeSet};

use super::no_prediction::NoPrediction;
use super::plan::{LaterTensors, Plan};
use crate::math::Profile;

/// Describes the targets of groups, as JSON.
pub(crate) fn groups_json(groups: &BTreeMap<String, Profile>) -> String {
    serde_json::json!(groups).to_string()
}

/// Tensors with a target of their own.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorGroup {
    /// Name of the group: the glob that chose its tensors.
    pub name: String,
    /// Names of the averaged tensors.
    pub tensors: Vec<String>,
}

/// Gives the tensors of each group the weights of a plan of their own. The figures are then those of the worst part.
///
/// Plans with the same groups at the same step can be synthesized in one pass.
pub(crate) fn with_groups(mut base: Plan, groups: Vec<(&TensorGroup, Plan)>) -> Plan {
    let mut all: Vec<LaterTensors> = Vec::new();
    for (group, plan) in groups {
        base.groups.insert(group.name.clone(), plan.profile.clone());
        base.relative_error = base.relative_error.max(plan.relative_error);
        base.noise_gain = base.noise_gain.max(plan.noise_gain);
        base.shortfall = base.shortfall.or(plan.shortfall);
        // The error is predicted for one target only.
        (base.predicted, base.worst_group, base.held_back) = (None, None, None);
        base.no_prediction = Some(NoPrediction::Groups);
        base.event = None;
        let mut rest: BTreeSet<String> = group.tensors.iter().cloned().collect();
        for later in plan.later {
            let tensors: Vec<String> = later.tensors.iter().filter(|name| rest.remove(*name)).cloned().collect();
            all.push(LaterTensors { tensors, ..later });
        }
        all.push(LaterTensors {
            since: 0,
            tensors: rest.into_iter().collect(),
            relative_error: plan.relative_error,
            noise_gain: plan.noise_gain,
            weights: plan.weights,
        });
    }
    let taken: BTreeSet<String> = all.iter().flat_map(|part| part.tensors.iter().cloned()).collect();
    base.later.iter_mut().for_each(|later| later.tensors.retain(|name| !taken.contains(name)));
    all.append(&mut base.later);
    base.later = all;
    base
}
