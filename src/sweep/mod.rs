//! Many lengths, one evaluation each, the best kept.
//!
//! [`Sweep`] is the search alone: it says which averages to evaluate next and is told their scores. [`Record`] keeps its
//! trials in a directory, so that a sweep that was interrupted goes on. [`Run::sweep`](crate::Run::sweep) joins them
//! with the synthesis: candidates are files, and the best one stays. [`Command`] is an evaluation by the shell.

mod candidates;
mod command;
mod observer;
mod output;
mod record;
mod refine;
mod run;
mod score;
mod search;
mod template;

pub use candidates::Candidate;
pub use command::Command;
pub use observer::Observer;
pub use record::{Record, SweepKey, identity};
pub use run::{SweepOptions, SweepResult};
pub use search::{Edge, Goal, Outcome, Sweep, Trial, TrialMetrics};

#[cfg(test)]
mod tests;
