//! Sets of files that the processes of a sharded training wrote, one file each. A set counts once it is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::id::PartNumber;
use super::listing::names;
use crate::error::{Result, shown};

/// Beginning of the names of part files of a live state.
const STATE: &str = "state-";

/// Beginning of the names of part files of a live state that is saved into a folder of the caller's.
const SAVED_STATE: &str = "posthoc-ema-";

/// Files of a live state of a sharded run, one of each process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateSet {
    /// Step of the last call.
    pub step: u64,
    /// In the order of their numbers.
    pub files: Vec<PathBuf>,
}

/// Returns the name of part file `i` of `n`, counted from 1, of the live state at a step.
pub(crate) fn state_part_name(step: u64, i: usize, n: usize) -> String {
    format!("{STATE}{step}-{}.safetensors", PartNumber { i, n })
}

/// Returns the name of part file `i` of `n`, counted from 1, of a live state in a folder of the caller's.
pub(crate) fn saved_part_name(i: usize, n: usize) -> String {
    format!("{SAVED_STATE}{}.safetensors", PartNumber { i, n })
}

/// Parses the name of a part file of a live state: step, and number.
pub(crate) fn parse_state_part(name: &str) -> Option<(u64, PartNumber)> {
    let (step, part) = name.strip_prefix(STATE)?.strip_suffix(".safetensors")?.split_once('-')?;
    let (step, part) = (step.parse().ok()?, PartNumber::parse(part)?);
    (state_part_name(step, part.i, part.n) == name).then_some((step, part))
}

fn parse_saved_part(name: &str) -> Option<PartNumber> {
    PartNumber::parse(name.strip_prefix(SAVED_STATE)?.strip_suffix(".safetensors")?)
}

/// Lists the complete live states of a sharded run, in the order of their steps. Incomplete ones are left out, with a
/// warning.
///
/// Sets of one step and of different sizes are written by different sessions.
///
/// # Errors
/// As [`list_each`](super::list_each).
pub(crate) fn list_states(dir: &Path) -> Result<Vec<StateSet>> {
    let mut states: BTreeMap<u64, PartNumbers> = BTreeMap::new();
    for (step, part) in names(dir)?.iter().filter_map(|name| parse_state_part(name)) {
        states.entry(step).or_default().add(part);
    }
    let mut complete = Vec::new();
    for (step, parts) in states {
        let name = |part: PartNumber| state_part_name(step, part.i, part.n);
        parts.warn_of_incomplete(dir, &format!("the live state at step {step}"), &name);
        for n in parts.complete() {
            let files = (1..=n).map(|i| dir.join(state_part_name(step, i, n))).collect();
            complete.push(StateSet { step, files });
        }
    }
    Ok(complete)
}

/// Returns the files of a live state that a sharded run saved into a folder, if there is a complete set. An incomplete
/// one is left out, with a warning.
///
/// # Errors
/// As [`list_each`](super::list_each).
pub(crate) fn saved_sets(dir: &Path) -> Result<Vec<Vec<PathBuf>>> {
    let mut parts = PartNumbers::default();
    names(dir)?.iter().filter_map(|name| parse_saved_part(name)).for_each(|part| parts.add(part));
    parts.warn_of_incomplete(dir, "a saved state", &|part| saved_part_name(part.i, part.n));
    let files = |n: usize| (1..=n).map(|i| dir.join(saved_part_name(i, n))).collect();
    Ok(parts.complete().map(files).collect())
}

/// Numbers of the part files that are there, by the sizes of their sets.
#[derive(Debug, Default)]
pub(super) struct PartNumbers(BTreeMap<usize, BTreeSet<usize>>);

impl PartNumbers {
    pub(super) fn add(&mut self, part: PartNumber) {
        self.0.entry(part.n).or_default().insert(part.i);
    }

    /// Iterates over the sizes of the complete sets.
    pub(super) fn complete(&self) -> impl Iterator<Item = usize> {
        self.0.iter().filter(|(n, found)| **n == found.len()).map(|(n, _)| *n)
    }

    /// Warns of each set that is not complete, with the name of a file that it lacks.
    pub(super) fn warn_of_incomplete(&self, dir: &Path, what: &str, name: &dyn Fn(PartNumber) -> String) {
        for (&n, found) in self.0.iter().filter(|(n, found)| **n != found.len()) {
            // The search ends after at most as many numbers as there are files, whatever size a name claims.
            let missing = (1..=n).find(|i| !found.contains(i)).unwrap_or(n);
            tracing::warn!(
                "{}: {what} is left out: {} of its {n} files are there, and {} is missing, so its write did not end",
                shown(dir),
                found.len(),
                name(PartNumber { i: missing, n })
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_canonical_names_of_states_parse() {
        let part = PartNumber { i: 2, n: 40 };
        assert_eq!(parse_state_part("state-700-part-00002-of-00040.safetensors"), Some((700, part)));
        assert_eq!(parse_saved_part("posthoc-ema-part-00002-of-00040.safetensors"), Some(part));
        for other in ["state.safetensors", "state-7.safetensors", "state-07-part-00001-of-00001.safetensors"] {
            assert_eq!(parse_state_part(other), None, "{other}");
        }
    }

    #[test]
    fn only_complete_states_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        let add = |name: String| std::fs::write(dir.path().join(name), "x").unwrap();
        assert_eq!(list_states(dir.path()).unwrap(), []);
        (1..=3).for_each(|i| add(state_part_name(20, i, 3)));
        (1..=2).for_each(|i| add(state_part_name(20, i, 2)));
        add(state_part_name(9, 1, 1));
        (2..=3).for_each(|i| add(state_part_name(30, i, 3)));
        add(state_part_name(40, 1, usize::MAX));
        let states = list_states(dir.path()).unwrap();
        let sizes: Vec<(u64, usize)> = states.iter().map(|state| (state.step, state.files.len())).collect();
        assert_eq!(sizes, [(9, 1), (20, 2), (20, 3)]);
        assert_eq!(states[2].files[1], dir.path().join("state-20-part-00002-of-00003.safetensors"));
        (1..=2).for_each(|i| add(saved_part_name(i, 2)));
        add(saved_part_name(1, 3));
        let saved = saved_sets(dir.path()).unwrap();
        assert_eq!(saved, [vec![dir.path().join(saved_part_name(1, 2)), dir.path().join(saved_part_name(2, 2))]]);
    }
}
