//! The weights of checkpoints in a target.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Checkpoints;
use crate::error::{Error, Result};
use crate::math::{Profile, Resolution};
use crate::planning::At;

/// Below so many checkpoints that count, an average is hardly one.
const FEW: f64 = 2.0;

/// The weights of checkpoints in one target, and what it costs that there are no more of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Merge {
    /// The profile that was asked for.
    pub profile: Profile,
    /// Its time.
    pub at: u64,
    /// `||p - r|| / ||r||`: how far the profile that the weights stand for, even between checkpoints, is from the target's,
    /// both over single steps.
    pub relative_error: f64,
    /// By how many steps the mean time of the average is later than the target's: a checkpoint is the end of the interval that
    /// it stands for.
    pub lag_steps: f64,
    /// `1 / sum_i x_i^2`: as many equally weighted checkpoints would average noise as well.
    pub effective_checkpoints: f64,
    /// The weights of all checkpoints at or before the target's time, in order of their steps; their sum is 1.
    pub weights: Vec<CheckpointWeight>,
}

/// The weight of one checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointWeight {
    /// Its file or folder.
    pub path: PathBuf,
    /// Its step.
    pub step: u64,
    /// Its weight; one of 0 is not read.
    pub weight: f64,
}

impl Merge {
    /// What a user should know before relying on the average: that hardly more than one checkpoint makes it.
    pub fn warning(&self) -> Option<String> {
        let Merge { profile, at, effective_checkpoints: effective, .. } = self;
        (*effective < FEW).then(|| {
            format!(
                "{profile} at step {at}: the weight of {effective:.2} checkpoints is all it has, so that it is hardly an \
                 average: ask for a longer one, or store checkpoints more often"
            )
        })
    }
}

pub(super) fn merge(checkpoints: &Checkpoints, profile: Profile, at: At) -> Result<Merge> {
    let steps = checkpoints.steps();
    let (first, last) = (steps[0], steps[steps.len() - 1]);
    let at = match at {
        At::Latest => last,
        At::Step(at) if at < first => return Err(Error::TargetBefore { at, first }),
        At::Step(at) if at > last => return Err(Error::TargetAfter { at, last }),
        At::Step(at) => at,
    };
    let Resolution { weights, relative_error, lag, effective } = Resolution::new(&profile, steps, at)?;
    let weight =
        |((path, &step), weight): ((&Path, &u64), f64)| CheckpointWeight { path: path.to_owned(), step, weight };
    let weights = checkpoints.paths().zip(steps).zip(weights).map(weight).collect();
    Ok(Merge { profile, at, relative_error, lag_steps: lag, effective_checkpoints: effective, weights })
}

/// A merge as the checkpoints that it was made for see it.
pub(super) struct Row {
    /// The weight of each, 0 for those after the target's time.
    pub weights: Vec<f64>,
    /// The index of the newest at or before the target's time.
    pub newest: usize,
}

/// # Errors
/// [`Error::OtherPlan`] for a merge of other checkpoints.
pub(super) fn row(checkpoints: &Checkpoints, merge: &Merge) -> Result<Row> {
    let known = checkpoints.paths().zip(checkpoints.steps());
    let same = merge.weights.iter().zip(known).all(|(own, (path, &step))| own.path == path && own.step == step);
    let until = checkpoints.steps.partition_point(|&step| step <= merge.at);
    if !same || merge.weights.is_empty() || merge.weights.len() != until {
        return Err(Error::OtherPlan { missing: "a checkpoint".into() });
    }
    let mut weights: Vec<f64> = merge.weights.iter().map(|weight| weight.weight).collect();
    weights.resize(checkpoints.steps.len(), 0.0);
    Ok(Row { weights, newest: until - 1 })
}
