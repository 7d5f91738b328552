//! Removal of the files that killed writers left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::id::{FileRole, parse};
use super::listing::{list, names};
use super::part_sets::list_states;
use super::state_names::parse_state_part;
use crate::error::Result;
use crate::fs::{attempt, is_temporary};

/// Removes the files that a killed writer left: temporary files, shards of sets that were never finished, and
/// incomplete sets of a sharded training.
///
/// The caller holds the lock of the run.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_leftovers(dir: &Path) -> Result<()> {
    let states = list_states(dir)?.into_iter().flat_map(|state| state.files);
    let finished: BTreeSet<PathBuf> = list(dir)?.into_values().flatten().chain(states).collect();
    for name in names(dir)? {
        let path = dir.join(&name);
        let is_part = matches!(parse(&name), Some((_, FileRole::Shard { .. } | FileRole::Part(_))))
            || parse_state_part(&name).is_some();
        let is_leftover = is_temporary(&name) || is_part && !finished.contains(&path);
        if is_leftover && path.is_file() {
            attempt("remove", &path, || fs::remove_file(&path))?;
        }
    }
    Ok(())
}
