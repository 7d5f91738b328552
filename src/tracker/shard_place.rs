//! Place of a process among those of a sharded run.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Result};
use crate::snapshot::{SnapshotId, state_part_name};

/// Place of a process in a sharded run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sharding {
    /// Number among the processes that store; none for a process that stores nothing.
    pub rank: Option<usize>,
    /// Number of processes that store.
    pub ranks: usize,
    /// Random identifier of this start, equal on all processes.
    pub id: String,
    /// Tied tensors, as `dropped name -> kept name`; found by their memory if there are none.
    pub ties: Option<BTreeMap<String, String>>,
    /// Tensors that another process stores.
    pub replicas: BTreeSet<String>,
    /// True if the option `average` names parameters of the model; decided by the names of this process if none.
    pub only_named: Option<bool>,
}

impl Sharding {
    pub(super) fn number(&self) -> ShardNumber {
        ShardNumber { rank: self.rank, ranks: self.ranks }
    }

    pub(super) fn check(&self) -> Result<()> {
        let fail = |reason: String| Err(Error::Setting { option: "shard", reason });
        let ranks = self.ranks;
        match self.rank {
            _ if ranks == 0 => fail("0 processes store: at least one must".into()),
            Some(rank) if rank >= ranks => fail(format!("rank {rank} is not below the number of ranks, {ranks}")),
            _ if ranks > 99_999 => fail(format!("{ranks} processes store, and a set has at most 99999 files")),
            _ if self.id.is_empty() => fail("the id is empty: pass a random string, the same on all processes".into()),
            _ => Ok(()),
        }
    }
}

/// Number of a process among those that store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ShardNumber {
    /// From 0 on; none for a process that stores nothing.
    pub rank: Option<usize>,
    pub ranks: usize,
}

impl ShardNumber {
    /// Returns true for the process that opens the run before all others, and repairs it.
    pub(super) fn is_first(self) -> bool {
        self.rank == Some(0)
    }

    /// Returns the name of this process's file of a snapshot.
    pub(super) fn snapshot_name(self, id: SnapshotId) -> String {
        id.part_name(self.rank.unwrap_or(0) + 1, self.ranks)
    }

    /// Returns the name of this process's file of the live state at a step.
    pub(super) fn state_name(self, step: u64) -> String {
        state_part_name(step, self.rank.unwrap_or(0) + 1, self.ranks)
    }
}
