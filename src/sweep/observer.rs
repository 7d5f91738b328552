//! Progress of a sweep.

use super::search::Sweep;
use super::trial::Trial;
use crate::math::Profile;

/// Receives the progress of a sweep. Every method does nothing by default.
pub trait Observer: Sync {
    /// Called before `targets` averages are synthesized, which reads `bytes` of snapshots.
    fn synthesizing(&self, _targets: usize, _bytes: u64) {}

    /// Called from any thread with the bytes that were read since the last call.
    fn read(&self, _bytes: u64) {}

    /// Called before an average is evaluated.
    fn evaluating(&self, _profile: &Profile, _sweep: &Sweep) {}

    /// Called after an evaluation was recorded.
    fn evaluated(&self, _trial: &Trial, _sweep: &Sweep) {}
}

/// Ignores all progress.
impl Observer for () {}
