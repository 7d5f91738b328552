//! Evaluation of averages of many lengths.
//!
//! [`Sweep`] is the search alone: it names the averages to evaluate next and takes their scores. [`Record`] keeps its
//! trials in a directory, so that an interrupted sweep continues. [`Run::sweep`](crate::Run::sweep) joins both with the
//! synthesis: candidates are files, and the best one is kept. [`Command`] evaluates a candidate by a shell command.

mod candidates;
mod command;
mod comparison;
mod curve;
mod evaluator;
mod folders;
mod joint;
mod observer;
mod options;
mod output;
mod outward;
mod points;
mod record;
mod refine;
mod run;
mod score;
mod scores;
mod search;
mod second;
mod template;
mod trial;

pub use candidates::{Candidate, WITH, remove_pending};
pub use command::Command;
pub use comparison::Comparison;
pub use joint::{JointSearch, SweepLine};
pub use observer::Observer;
pub use options::{SweepOptions, SweepResult};
pub use record::{Record, SweepKey, identity};
pub use scores::Scores;
pub use search::{Edge, Sweep};
pub use trial::{Goal, Metric, Trial, TrialMetrics, TrialOutcome};

#[cfg(test)]
mod tests;
#[cfg(test)]
mod width_tests;
