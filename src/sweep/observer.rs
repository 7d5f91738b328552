//! Who looks on.

use super::search::{Sweep, Trial};
use crate::math::Profile;

/// Told how a sweep goes on; each method does nothing unless it is written.
pub trait Observer: Sync {
    /// So many averages are synthesized, for which so many bytes of snapshots are read.
    fn synthesizing(&self, _targets: usize, _bytes: u64) {}

    /// So many bytes more were read; from any thread.
    fn read(&self, _bytes: u64) {}

    /// An average is about to be evaluated.
    fn evaluating(&self, _profile: &Profile, _sweep: &Sweep) {}

    /// An evaluation is over and recorded.
    fn evaluated(&self, _trial: &Trial, _sweep: &Sweep) {}
}

/// Nobody.
impl Observer for () {}
