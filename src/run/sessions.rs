//! Sessions of a run's snapshots: finds those of two processes that wrote at one time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::parsed_snapshot::ParsedSnapshot;
use crate::error::{Error, Result};
use crate::snapshot::{Session, Snapshot};

/// Finds the snapshots whose sessions contradict those of the others, in the order given, and describes each.
///
/// The snapshots of the newest session count, and those of the sessions that it continues. Of sessions of the same
/// number, the one with most snapshots counts. Snapshots of older versions, which store no session, never contradict.
fn strays(snapshots: &[&Snapshot]) -> Vec<(usize, Error)> {
    let mut groups: BTreeMap<Reverse<u64>, Vec<(usize, &Session)>> = BTreeMap::new();
    for (i, snapshot) in snapshots.iter().enumerate() {
        if let Some(session) = &snapshot.meta.session {
            groups.entry(Reverse(session.number)).or_default().push((i, session));
        }
    }
    let mut strays = Vec::new();
    // Snapshot whose session allows the fewest steps to earlier ones.
    let mut limit: Option<(usize, &Session)> = None;
    for group in groups.into_values() {
        let precedes = |(i, session): &(usize, &Session)| {
            limit.is_none_or(|(_, later)| session.can_precede(snapshots[*i].id.step, later))
        };
        let (fitting, late): (Vec<_>, Vec<_>) = group.into_iter().partition(precedes);
        strays.extend(late.iter().filter_map(|(i, _)| Some((*i, limit?))));
        let Some(chosen) = most_common(&fitting) else { continue };
        strays.extend(fitting.iter().filter(|(_, session)| *session != chosen.1).map(|(i, _)| (*i, chosen)));
        if limit.is_none_or(|(_, later)| chosen.1.from < later.from) {
            limit = Some(chosen);
        }
    }
    strays.sort_by_key(|(i, _)| *i);
    strays.into_iter().map(|(i, (other, _))| (i, stray(snapshots[i], snapshots[other]))).collect()
}

/// Snapshot of a list, by its place, and its session.
type Placed<'a> = (usize, &'a Session);

/// Returns a snapshot of the session that most of them have.
fn most_common<'a>(group: &[Placed<'a>]) -> Option<Placed<'a>> {
    let mut counts: BTreeMap<(&str, u64), (usize, Placed<'a>)> = BTreeMap::new();
    for &(i, session) in group {
        counts.entry((&session.id, session.from)).or_insert((0, (i, session))).0 += 1;
    }
    counts.into_values().max_by_key(|(count, (i, _))| (*count, Reverse(*i))).map(|(_, chosen)| chosen)
}

fn stray(snapshot: &Snapshot, other: &Snapshot) -> Error {
    let named = |snapshot: &Snapshot| snapshot.meta.session.as_ref().map(ToString::to_string).unwrap_or_default();
    let why = format!(
        "two processes wrote this run at one time: the snapshot is of session {}, which does not continue into session \
         {} of {}: move the files of one of the sessions out of the directory",
        named(snapshot),
        named(other),
        other.path().display()
    );
    Error::unexpected(snapshot.path(), why)
}

/// Checks that the sessions of a run's snapshots follow one another.
///
/// # Errors
/// [`Error::Unexpected`] for the first snapshot that does not fit.
pub(super) fn check(snapshots: &[Snapshot]) -> Result<()> {
    let strays = strays(&snapshots.iter().collect::<Vec<_>>());
    strays.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
}

/// Removes the snapshots whose sessions contradict those of the others, and returns their errors.
pub(super) fn remove_strays(snapshots: &mut Vec<ParsedSnapshot>) -> Vec<Error> {
    let strays = strays(&snapshots.iter().map(|parsed| &parsed.snapshot).collect::<Vec<_>>());
    let (places, errors): (BTreeSet<usize>, Vec<Error>) = strays.into_iter().unzip();
    let mut place = 0..;
    snapshots.retain(|_| place.next().is_none_or(|place| !places.contains(&place)));
    errors
}
