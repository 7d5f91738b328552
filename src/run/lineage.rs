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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::run::Settings;

    fn session(number: u64, from: u64) -> Session {
        Session { number, id: number.to_string(), from }
    }

    /// Returns a state with updates every 10 steps.
    fn state(last: u64, lineage: &[Session], session: Option<Session>) -> StateDocument {
        StateDocument {
            run: "run".into(),
            session,
            lineage: lineage.to_vec(),
            clock: last,
            history: History::from_times((10..=last).step_by(10)).unwrap(),
            stored: None,
            tied: BTreeMap::new(),
            settings: Settings::default(),
            dtypes: BTreeMap::new(),
            extensions: Vec::new(),
        }
    }

    #[test]
    fn course_follows_the_sessions_that_led_to_the_state() {
        // Session 3 went on from step 60 of session 1, after session 2 had gone on from its step 30.
        let third = state(90, &[session(1, 0)], Some(session(3, 60)));
        let reaches = |step, session: &Session| {
            let history = History::from_times((10..=step).step_by(10)).unwrap();
            third.reaches(step, Some(&history), Some(session))
        };
        for (step, number, from, expected) in
            [(60, 1, 0, true), (70, 1, 0, false), (40, 2, 30, false), (70, 3, 60, true), (90, 3, 60, true)]
        {
            assert_eq!(reaches(step, &session(number, from)), expected, "session {number} at {step}");
        }
        assert!(!reaches(100, &session(3, 60)));
        let other_times = History::from_times([10, 15, 60]).unwrap();
        assert!(!third.reaches(60, Some(&other_times), Some(&session(1, 0))));
        assert!(third.follows(&state(50, &[], Some(session(1, 0)))));
        assert!(!third.follows(&state(70, &[], Some(session(1, 0)))));
        assert!(third.follows(&state(0, &[], Some(session(2, 30)))));
    }

    #[test]
    fn files_of_older_versions_are_compared_by_what_they_store() {
        // Neither a session nor a lineage; a session, but no lineage.
        let oldest = state(50, &[], None);
        assert!(oldest.reaches(50, None, None) && oldest.reaches(40, None, Some(&session(1, 0))));
        assert!(!oldest.reaches(60, None, None));
        let older = state(50, &[], Some(session(4, 30)));
        assert!(older.reaches(30, None, Some(&session(2, 0))) && !older.reaches(40, None, Some(&session(2, 0))));
        assert!(!older.reaches(40, None, Some(&session(5, 30))) && older.reaches(40, None, None));
    }

    #[test]
    fn restarts_without_progress_do_not_grow_the_list() {
        let mut document = state(50, &[session(1, 0)], Some(session(2, 20)));
        for number in 3..1000 {
            document.lineage = document.earlier_sessions();
            document.session = Some(session(number, 50));
        }
        assert_eq!(document.earlier_sessions(), [session(1, 0), session(2, 20), session(999, 50)]);
    }
}
