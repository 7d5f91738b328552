//! Retention: the snapshots to keep so that the worst error over a range of targets stays small.

mod dense;

use serde::{Deserialize, Serialize};

use super::conversion::MAX_SIGMA_REL;
use super::profile::Profile;
use crate::error::{Error, Result};

pub(crate) use dense::dense_errors;
use dense::{ConstrainedSolve, DenseProducts};

/// Number of evenly spaced lengths of the range at which the error is computed.
const TARGETS: usize = 12;

/// Most sources for which errors are computed; a larger solve would take longer than a snapshot should.
///
/// With more sources, evenly spaced ones are good enough.
const MOST_SOURCES: usize = 256;

/// Rule for the steps whose snapshots a run keeps when it has more than `max_checkpoints`.
///
/// The newest step is always kept. The snapshots of one step are kept or dropped together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Retention {
    /// Keeps the steps for a range of power-function targets.
    ///
    /// It drops the step whose loss raises the worst relative error over the range least.
    Range {
        /// The shortest length, as `sigma_rel`.
        from: f64,
        /// The longest length, as `sigma_rel`.
        to: f64,
    },
    /// Keeps the newest steps. Only lengths that fit in them can be synthesized.
    Latest,
    /// Keeps the first snapshot at or after each of these steps, regardless of `max_checkpoints`.
    Steps(Vec<u64>),
}

impl Default for Retention {
    /// Returns the range 0.05 to 0.28.
    fn default() -> Self {
        Retention::Range { from: 0.05, to: 0.28 }
    }
}

impl Retention {
    /// Checks the range, and that a list has steps.
    ///
    /// # Errors
    /// [`Error::Setting`] for lengths that no power-function profile has, for a range in the wrong order, and for an
    /// empty list.
    pub fn check(&self) -> Result<()> {
        match *self {
            Retention::Range { from, to } if !(from > 0.0 && from <= to && to <= MAX_SIGMA_REL) => {
                let reason = format!(
                    "the range of lengths {from} to {to}: give the shorter sigma_rel first, both above 0 and at most \
                     {MAX_SIGMA_REL:.6}"
                );
                Err(Error::Setting { option: "retention", reason })
            }
            Retention::Steps(ref steps) if steps.is_empty() => {
                let reason = "no step is listed: list the steps to keep, or keep the newest (latest)".into();
                Err(Error::Setting { option: "retention", reason })
            }
            _ => Ok(()),
        }
    }

    /// Returns the steps to drop so that `keep` of the increasing `steps` are left.
    ///
    /// The run tracks the profiles `tracked`; its first update was at `first`.
    pub fn surplus(&self, tracked: &[Profile], first: u64, steps: &[u64], keep: usize) -> Vec<u64> {
        let excess = steps.len().saturating_sub(keep.max(1));
        match self {
            Retention::Latest => steps[..excess].to_vec(),
            Retention::Steps(wanted) => unlisted(steps, wanted),
            Retention::Range { from, to } => {
                let mut thinning = Thinning::new(tracked, targets(*from, *to, TARGETS), first);
                steps.iter().for_each(|&step| thinning.push(step));
                (0..excess).map(|_| thinning.drop_least_needed()).collect()
            }
        }
    }

    /// Applies the rule after each of the increasing `snapshots` of a training, and returns the steps that are left.
    ///
    /// `look` is called with the kept steps after each snapshot. The arguments are those of [`Retention::surplus`].
    pub(crate) fn over_training(
        &self,
        tracked: &[Profile],
        first: u64,
        snapshots: &[u64],
        keep: usize,
        mut look: impl FnMut(&[u64]),
    ) -> Vec<u64> {
        let mut kept = Vec::new();
        let Retention::Range { from, to } = self else {
            for &step in snapshots {
                kept.push(step);
                let surplus = self.surplus(tracked, first, &kept, keep);
                kept.retain(|step| !surplus.contains(step));
                look(&kept);
            }
            return kept;
        };
        let mut thinning = Thinning::new(tracked, targets(*from, *to, TARGETS), first);
        for &step in snapshots {
            thinning.push(step);
            if thinning.steps.len() > keep.max(1) {
                thinning.drop_least_needed();
            }
            look(&thinning.steps);
        }
        thinning.steps
    }
}

/// Returns all steps but the newest and the first at or after each wanted step.
fn unlisted(steps: &[u64], wanted: &[u64]) -> Vec<u64> {
    let mut kept = vec![false; steps.len()];
    for step in wanted {
        if let Some(kept) = kept.get_mut(steps.partition_point(|s| s < step)) {
            *kept = true;
        }
    }
    if let Some(newest) = kept.last_mut() {
        *newest = true;
    }
    steps.iter().zip(kept).filter(|(_, kept)| !kept).map(|(step, _)| *step).collect()
}

/// Returns power functions of `count` evenly spaced lengths of a range.
pub(crate) fn targets(from: f64, to: f64, count: usize) -> Vec<Profile> {
    let length = |i: usize| from + (to - from) * i as f64 / (count - 1).max(1) as f64;
    (0..count).filter_map(|i| Profile::sigma_rel(length(i).clamp(from, to)).ok()).collect()
}

/// Steps of a run that are dropped one by one.
struct Thinning {
    products: DenseProducts,
    /// True if products are computed: errors are, for as many sources.
    has_products: bool,
    steps: Vec<u64>,
}

impl Thinning {
    fn new(tracked: &[Profile], targets: Vec<Profile>, first: u64) -> Thinning {
        let products = DenseProducts::new(tracked.to_vec(), targets, first);
        Thinning { products, has_products: false, steps: Vec::new() }
    }

    /// Adds a step after all others.
    fn push(&mut self, step: u64) {
        self.steps.push(step);
        if self.has_products {
            self.products.push(step);
        }
    }

    /// Drops a step, never the newest of several, and returns it.
    fn drop_least_needed(&mut self) -> u64 {
        let index = self.least_needed();
        if self.has_products {
            self.products.remove(index);
        }
        self.steps.remove(index)
    }

    fn least_needed(&mut self) -> usize {
        if self.steps.len() < 3 {
            return 0;
        }
        if self.steps.len() * self.products.tracked.len() > MOST_SOURCES {
            return most_crowded(&self.steps);
        }
        if !self.has_products {
            self.steps.iter().for_each(|&step| self.products.push(step));
            self.has_products = true;
        }
        let errors = ConstrainedSolve::new(&self.products).errors_without();
        // The sum decides between steps that leave the same worst error.
        let best = errors.iter().enumerate().min_by(|(_, a), (_, b)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        best.map_or(0, |(step, _)| step)
    }
}

/// Returns the index of the step whose neighbours are closest together, relative to the square root of the step.
///
/// The root keeps more steps early in training, where power functions bend most. Of a thousand steps thinned to 200, it
/// leaves half the error of even distances or even ratios, or less.
fn most_crowded(steps: &[u64]) -> usize {
    let gap = |i: usize| (steps[i + 1] - steps[i - 1]) as f64 / (steps[i] as f64).sqrt();
    (1..steps.len() - 1).min_by(|&a, &b| gap(a).total_cmp(&gap(b))).unwrap_or(0)
}

#[cfg(test)]
mod tests;
