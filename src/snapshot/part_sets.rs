//! Sets of files that the processes of a sharded training wrote, one file each. A set counts once it is complete.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::id::PartNumber;
use super::listing::{current_names, names};
use super::part_numbers::PartNumbers;
use super::state_names::{parse_saved_part, parse_state_part, saved_part_name, state_part_name};
use crate::error::Result;

/// Files of a live state of a sharded run, one of each process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateSet {
    /// Step of the last call.
    pub step: u64,
    /// In the order of their numbers.
    pub files: Vec<PathBuf>,
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
    for (step, part) in current_names(dir)?.iter().filter_map(|name| parse_state_part(name)) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
