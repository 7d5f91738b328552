//! Course of a training: the sessions that led to a live state, and the snapshots that belong to it.

use super::StateDocument;
use crate::error::Result;
use crate::math::History;
use crate::planning::read_chain;
use crate::snapshot::{Session, Snapshot};

impl StateDocument {
    /// Returns true if a snapshot of the same run is part of the course that led to this state.
    ///
    /// # Errors
    /// Those of a snapshot whose history cannot be read.
    pub(crate) fn contains(&self, snapshot: &Snapshot) -> Result<bool> {
        let (_, _, history) = read_chain(snapshot)?;
        Ok(self.reaches(snapshot.id.step, history.as_ref(), snapshot.meta.session.as_ref()))
    }

    /// Returns true if the course of this state contains another state.
    pub(crate) fn follows(&self, earlier: &StateDocument) -> bool {
        let step = earlier.history.last().unwrap_or(0);
        step == 0 || self.reaches(step, Some(&earlier.history), earlier.session.as_ref())
    }

    /// Returns true if an average at `step` with these updates, which this session stored, is part of the course.
    ///
    /// Without a history or a session, as older versions stored them, only the rest is compared.
    fn reaches(&self, step: u64, history: Option<&History>, session: Option<&Session>) -> bool {
        if !self.history.contains(step) || history.is_some_and(|history| !history.is_prefix_of(&self.history)) {
            return false;
        }
        let sessions: Vec<&Session> = self.lineage.iter().chain(&self.session).collect();
        let (Some(session), Some(first)) = (session, sessions.first()) else { return true };
        match sessions.iter().position(|own| *own == session) {
            // The next session went on from an update at `from`: what this one stored later was left.
            Some(i) => sessions.get(i + 1).is_none_or(|next| step <= next.from),
            // A state of an older version does not list the sessions before its own.
            None => session.can_precede(step, first),
        }
    }

    /// Returns the sessions before one that goes on from this state.
    ///
    /// Of the earlier ones, those that made no update are left out: jobs that restart many times add nothing.
    pub(crate) fn earlier_sessions(&self) -> Vec<Session> {
        let last = self.history.last().unwrap_or(0);
        let earlier = self.lineage.iter().filter(|session| session.from < last);
        earlier.chain(&self.session).cloned().collect()
    }
}
