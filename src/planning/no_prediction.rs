//! Reasons for a plan without a predicted error.

use std::fmt;

use serde::{Serialize, Serializer};

/// Fewest steps of averages that separate drift, walk and noise.
pub(crate) const FEWEST_STEPS: usize = 3;

/// Reason why a plan has no predicted error. Its text has the remedy, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPrediction {
    /// The training has not begun, and nothing is known of its movement.
    BeforeTraining,
    /// Averages are of too few steps up to the target's time.
    FewSteps {
        /// Number of these steps.
        steps: usize,
    },
    /// The snapshots do not record their updates.
    NoHistory,
    /// No averaged tensor is in all snapshots with finite values.
    NoSample,
    /// The sampled elements do not move, and there are others.
    Still,
    /// All sampled weights are 0, so that no error is relative to them.
    Zeros,
    /// Groups of tensors have targets of their own.
    Groups,
    /// A process of a sharded run holds only parts of the tensors.
    Parts,
    /// Nobody asked for a prediction: the plan belongs to a synthesis.
    NotAsked,
}

impl fmt::Display for NoPrediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            NoPrediction::BeforeTraining => {
                "before training nothing is known of the movement of the weights: name one (movement), or a run that \
                 moves alike (like)"
            }
            NoPrediction::FewSteps { steps } => {
                let steps = if *steps == 1 { "1 step".into() } else { format!("{steps} steps") };
                return write!(
                    f,
                    "averages of {steps} do not show how the weights move, those of {FEWEST_STEPS} steps do: train on, \
                     or store snapshots sooner (checkpoint_every, snapshot_growth)"
                );
            }
            NoPrediction::NoHistory => "the snapshots do not record their updates: train with a newer version",
            NoPrediction::NoSample => "no averaged tensor has finite values in all snapshots: look for NaN in them",
            NoPrediction::Still => {
                "the sampled elements are equal in all snapshots, which says nothing of the others: compare averages \
                 of two lengths"
            }
            NoPrediction::Zeros => "all sampled weights are 0, and errors are relative to them: train on",
            NoPrediction::Groups => {
                "the movement is measured for all tensors together, and groups have targets of their own: plan each \
                 target for all tensors to see its prediction"
            }
            NoPrediction::Parts => {
                "this process of a sharded run holds only parts of the weights: plan the run's snapshots in its \
                 directory"
            }
            NoPrediction::NotAsked => "a synthesis does not predict: ask for the plan of the target",
        };
        f.write_str(text)
    }
}

/// Serializes the text.
impl Serialize for NoPrediction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
