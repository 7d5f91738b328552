//! Reasons why a plan is far from its target, and what to do about each.

use std::fmt;

use serde::{Serialize, Serializer};

use super::source::IndexedSource;
use crate::math::{Chain, Profile};

/// Relative error above which a plan has a [`Shortfall`].
pub const LARGE_ERROR: f64 = 0.05;

/// Share by which a length may be beyond a tracked one and count as equal to it.
const SAME_LENGTH: f64 = 1e-9;

/// Reason why a plan has a large relative error. Its text has the remedy, too.
#[derive(Clone, Debug, PartialEq)]
pub enum Shortfall {
    /// The target's time lies between the steps that are stored.
    Between {
        /// The nearest of these steps.
        nearest: u64,
    },
    /// The target's length is outside of the tracked ones.
    Outside {
        /// The shortest tracked length, as `sigma_rel` at the target's time.
        shortest: f64,
        /// The longest tracked length.
        longest: f64,
    },
    /// Too few averages are there so far.
    Few {
        /// Number of steps that averages are there of.
        steps: usize,
        /// The first of these steps.
        first: u64,
        /// The last of these steps.
        last: u64,
    },
    /// Only tensors that began after the run did are far from their target.
    Later {
        /// The step at which they began.
        since: u64,
        /// Number of the tensors.
        tensors: usize,
        /// Their relative error.
        relative_error: f64,
        /// The reason for it.
        reason: Box<Shortfall>,
    },
}

impl Shortfall {
    /// Returns the reason for the error of a target; `None` for a small error.
    pub(super) fn of(sources: &[IndexedSource], profile: &Profile, at: u64, relative_error: f64) -> Option<Shortfall> {
        // NaN is not small.
        if relative_error <= LARGE_ERROR {
            return None;
        }
        let mut steps: Vec<u64> = sources.iter().map(|source| source.step).collect();
        steps.sort_unstable();
        steps.dedup();
        let nearest = steps.iter().copied().min_by_key(|step| step.abs_diff(at)).unwrap_or(at);
        if nearest != at {
            return Some(Shortfall::Between { nearest });
        }
        let tracked = sources.iter().filter_map(|source| match &source.chain {
            Chain::Tracked(profile) => profile.sigma_rel_at(at as f64),
            Chain::Ema(chain) => chain.profile().ok()?.sigma_rel_at(at as f64),
            _ => None,
        });
        let (shortest, longest) = tracked.fold((f64::INFINITY, 0.0), |(a, b), length| (length.min(a), length.max(b)));
        if let Some(length) = profile.sigma_rel_at(at as f64).filter(|_| longest > 0.0)
            && (length < shortest * (1.0 - SAME_LENGTH) || length > longest * (1.0 + SAME_LENGTH))
        {
            return Some(Shortfall::Outside { shortest, longest });
        }
        steps.retain(|step| *step <= at);
        let first = steps.first().copied().unwrap_or(at);
        Some(Shortfall::Few { steps: steps.len(), first, last: at })
    }
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shortfall::Later { since, tensors, reason, .. } => {
                write!(f, "for {tensors} of its tensors, which began at step {since}, {reason}")
            }
            Shortfall::Between { nearest } => {
                write!(f, "the step lies between snapshots: ask for step {nearest}, the nearest that is stored")
            }
            Shortfall::Outside { shortest, longest } => {
                let range = if shortest < longest {
                    format!("the tracked sigma_rel {} to {}", short(*shortest), short(*longest))
                } else {
                    format!("the only tracked sigma_rel, {}", short(*shortest))
                };
                write!(f, "the length is outside of {range}: ask for one within, or track it in the next training")
            }
            Shortfall::Few { steps, first, last } => {
                let of = if *steps == 1 {
                    format!("of step {last} alone")
                } else {
                    format!("of {steps} steps, {first} to {last},")
                };
                write!(
                    f,
                    "averages {of} are too few so far: store them more often (checkpoint_every, snapshot_growth), and \
                     keep more (max_checkpoints, retention)"
                )
            }
        }
    }
}

/// Serializes the text.
impl Serialize for Shortfall {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Formats a length to four digits.
fn short(length: f64) -> f64 {
    format!("{length:.3e}").parse().unwrap_or(length)
}
