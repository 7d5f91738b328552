//! Sessions of a run: the processes that wrote it, one after the other.
//!
//! A process that opens a run for writing begins a session. Every file that it writes carries the session. Snapshots of
//! an earlier session are not newer than the state that a later one resumed from; otherwise both wrote at one time.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};

use serde::{Deserialize, Serialize};

/// Returns a random identifier for a new run, of 128 bits from the system.
pub fn new_run_id() -> String {
    random_digits() + &random_digits()
}

/// Returns 64 random bits of the system as hexadecimal digits.
pub(super) fn random_digits() -> String {
    format!("{:016x}", RandomState::new().build_hasher().finish())
}

/// Session of a run: one process that writes it, from its opening to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Number of the session within the run, counted from 1.
    pub number: u64,
    /// Random identifier. Two processes that resume from one state begin sessions of the same number.
    pub id: String,
    /// Step of the newest update in the state that it resumed from; 0 for a new run.
    pub from: u64,
}

impl Session {
    /// Begins a session after session number `previous`, from a state whose newest update is at `from`.
    pub(crate) fn begin(previous: u64, from: u64) -> Session {
        Session { number: previous.saturating_add(1), id: random_digits(), from }
    }

    /// Returns true if a file of this session at `step` can precede the files of another session, or belongs to the
    /// same.
    pub(crate) fn can_precede(&self, step: u64, other: &Session) -> bool {
        self == other || (self.number < other.number && step <= other.from)
    }
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, begun at step {})", self.number, self.id, self.from)
    }
}
