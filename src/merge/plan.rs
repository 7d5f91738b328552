//! The weights of checkpoints in a target.

use std::path::PathBuf;

use serde::Serialize;

use super::Checkpoints;
use crate::error::{Error, Result, shown};
use crate::math::{Profile, Resolution};
use crate::planning::At;

/// Smallest number of effective checkpoints that makes an average.
const MIN_EFFECTIVE: f64 = 2.0;

/// Weights of checkpoints in one target, and the cost of having no more checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Merge {
    /// Profile of the target.
    pub profile: Profile,
    /// Time of the target, a step.
    pub at: u64,
    /// Distance of the average from the target for parameters that walk at random, relative to that of the newest
    /// parameters: [`Resolution::relative_error`](crate::math::Resolution).
    ///
    /// It is 1 if the newest checkpoint has all the weight, and 0 if there is one at each step.
    pub relative_error: f64,
    /// Steps by which the mean time of the average is later than the target's.
    ///
    /// A checkpoint is the end of the interval that it stands for.
    pub lag_steps: f64,
    /// Number of equally weighted checkpoints that would average noise as well: `1 / sum_i x_i^2`.
    pub effective_checkpoints: f64,
    /// Weights of all checkpoints at or before the target's time, in order of their steps. Their sum is 1.
    pub weights: Vec<CheckpointWeight>,
}

/// Weight of one checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointWeight {
    /// File or folder of the checkpoint.
    pub path: PathBuf,
    /// Step of the checkpoint.
    pub step: u64,
    /// Weight; a checkpoint with weight 0 is not read.
    pub weight: f64,
}

impl Merge {
    /// Returns a warning if hardly more than one checkpoint counts.
    pub fn warning(&self) -> Option<String> {
        let Merge { profile, at, effective_checkpoints: effective, .. } = self;
        if *effective >= MIN_EFFECTIVE {
            return None;
        }
        Some(format!(
            "{profile} at step {at}: only {effective:.2} checkpoints count, so this is hardly an average: ask for a \
             longer one, or store checkpoints more often"
        ))
    }
}

/// Weighs the checkpoints for one target.
///
/// # Errors
/// As [`Checkpoints::plan`].
pub(super) fn plan(checkpoints: &Checkpoints, profile: Profile, at: At) -> Result<Merge> {
    let steps = checkpoints.steps();
    let first = steps[0];
    let last = steps[steps.len() - 1];
    let at = match at {
        At::Latest => last,
        At::Step(at) if at < first => return Err(Error::TargetBefore { at, first }),
        At::Step(at) if at > last => return Err(Error::TargetAfter { at, last }),
        At::Step(at) => at,
    };
    let resolution = Resolution::new(&profile, steps, at)?;
    let mut weights = Vec::with_capacity(resolution.weights.len());
    for ((path, &step), weight) in checkpoints.paths().zip(steps).zip(resolution.weights) {
        weights.push(CheckpointWeight { path: path.to_owned(), step, weight });
    }
    Ok(Merge {
        profile,
        at,
        relative_error: resolution.relative_error,
        lag_steps: resolution.lag,
        effective_checkpoints: resolution.effective,
        weights,
    })
}

/// Merge in terms of the open checkpoints' indices.
pub(super) struct MergeRow {
    /// Weight of each checkpoint, 0 after the target's time.
    pub weights: Vec<f64>,
    /// Index of the newest checkpoint at or before the target's time.
    pub newest: usize,
}

impl MergeRow {
    /// Matches a merge to the open checkpoints.
    ///
    /// # Errors
    /// [`Error::OtherPlan`] for a merge of other checkpoints.
    pub(super) fn new(checkpoints: &Checkpoints, merge: &Merge) -> Result<MergeRow> {
        let mut open = checkpoints.paths().zip(checkpoints.steps());
        for CheckpointWeight { path, step, .. } in &merge.weights {
            if open.next() != Some((path.as_path(), step)) {
                return Err(Error::OtherPlan { missing: format!("checkpoint {} (step {step})", shown(path)) });
            }
        }
        let until = checkpoints.steps.partition_point(|&step| step <= merge.at);
        if merge.weights.is_empty() || merge.weights.len() != until {
            return Err(Error::OtherPlan { missing: "exactly its own list of checkpoints".into() });
        }
        let mut weights: Vec<f64> = merge.weights.iter().map(|weight| weight.weight).collect();
        weights.resize(checkpoints.steps.len(), 0.0);
        Ok(MergeRow { weights, newest: until - 1 })
    }

    /// Returns the row with other weights of the checkpoints up to the newest.
    pub(super) fn with_weights(&self, weights: &[f64]) -> MergeRow {
        let mut weights = weights.to_vec();
        weights.resize(self.weights.len(), 0.0);
        MergeRow { weights, newest: self.newest }
    }
}
