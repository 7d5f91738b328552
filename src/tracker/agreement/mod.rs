//! Agreement of the processes of a sharded run, before anything is written.
//!
//! Each process describes its tensors and options in a manifest. One process compares all manifests, and gives each
//! process its role.

mod compare;
mod fingerprint;
mod manifest;
mod storing;
#[cfg(test)]
mod tests;
mod tiling;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::snapshot::new_run_id;
use compare::TensorGroups;
pub use manifest::ShardManifest;

/// Role of one process in a sharded run, for [`Options::role`](crate::Options::role).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRole {
    /// Random identifier of this start, equal on all processes.
    pub id: String,
    /// Number among the processes that store; none for a process that stores nothing.
    pub rank: Option<usize>,
    /// Number of processes that store.
    pub ranks: usize,
    /// Names of tensors of this process that another one stores.
    pub replicas: BTreeSet<String>,
    /// Tied tensors of the whole model, as `dropped name -> kept name`.
    pub ties: BTreeMap<String, String>,
    /// True if the option `average` names parameters of the model, so that no others are averaged.
    pub only_named: bool,
}

impl ShardRole {
    /// Returns the role as JSON, for its process.
    pub fn to_json(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// Reads a role from JSON.
    ///
    /// # Errors
    /// [`Error::Setting`] for other text.
    pub fn from_json(text: &str) -> Result<ShardRole> {
        parse("role", text)
    }
}

/// Compares the manifests of all processes of a sharded run, and returns the role of each, in their order.
///
/// Of equal rectangles of a tensor, the process of the lowest number stores its own. The processes that store anything
/// are numbered in the order of theirs. Each call makes a new identifier.
///
/// # Errors
/// [`Error::Disagreement`], which names the processes and the tensor or option, if
/// * options, the run on disk, or a tensor's global shape, dtype or kind differ between processes;
/// * replicas of one rectangle have different values: they are tensors of different processes under one name. Buffers
///   may differ;
/// * parts of a tensor overlap, or leave a hole.
///
/// [`Error::Setting`] for a pattern of names without a match, and [`Error::NothingToAverage`].
pub fn agree(manifests: &[ShardManifest]) -> Result<Vec<ShardRole>> {
    compare::check_processes(manifests)?;
    compare::check_options(manifests)?;
    let groups = TensorGroups::new(manifests)?;
    let only_named = groups.check_choice(&manifests[0])?;
    let stored = storing::stored(manifests, &groups)?;
    let mut storing: Vec<usize> = (0..manifests.len()).filter(|&i| !stored[i].is_empty()).collect();
    storing.sort_by_key(|&i| manifests[i].process);
    let id = new_run_id();
    let role = |i: usize| ShardRole {
        id: id.clone(),
        rank: storing.iter().position(|&other| other == i),
        ranks: storing.len(),
        replicas: storing::replicas(&manifests[i], &groups, &stored[i]),
        ties: groups.ties.clone(),
        only_named,
    };
    Ok((0..manifests.len()).map(role).collect())
}

/// Returns the error of processes, given by their numbers, that do not fit together.
fn disagreement(mut processes: Vec<usize>, reason: String) -> Error {
    processes.sort_unstable();
    processes.dedup();
    Error::Disagreement { processes, reason }
}

fn parse<T: serde::de::DeserializeOwned>(option: &'static str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        let reason = format!("this is not what the same version of the library wrote: {error}");
        Error::Setting { option, reason }
    })
}
