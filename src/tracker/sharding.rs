//! Sharded runs: the place of this process among those that track one model together.

use std::collections::{BTreeMap, BTreeSet};

use super::agreement::ShardRole;
use super::{OnNonFinite, Options};
use crate::error::{Error, Result};

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
    fn check(&self) -> Result<()> {
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

impl Options {
    /// Tracks one part of a model that several processes hold together. Default: this process holds the whole model.
    ///
    /// Each process averages the tensors that it lends, whole or [parts](crate::TensorView::as_part_of), and stores
    /// those that are not [replicas](crate::TensorView::as_replica). `ranks` processes store; `rank` is the number of
    /// this one among them, from 0 on, or `None` if it stores nothing. `id` is a random string, new at each start, that
    /// all processes share. [`agree`](crate::agree) finds all of these, and [`Options::role`] sets them.
    ///
    /// The process of rank 0 opens the run first, and repairs it. The others open it after that, and all have opened it
    /// before any updates: the caller waits in between. All processes call [`PostHocEma::update`],
    /// [`PostHocEma::save`] and [`PostHocEma::finish`] at the same steps. The averages have the bits of one process
    /// that tracks the whole model. A snapshot counts once all processes have written their parts of it.
    ///
    /// [`PostHocEma::update`]: crate::PostHocEma::update
    /// [`PostHocEma::save`]: crate::PostHocEma::save
    /// [`PostHocEma::finish`]: crate::PostHocEma::finish
    pub fn shard(mut self, rank: Option<usize>, ranks: usize, id: impl Into<String>) -> Self {
        let (ties, replicas, only_named) = (None, BTreeSet::new(), None);
        self.shard = Some(Sharding { rank, ranks, id: id.into(), ties, replicas, only_named });
        self
    }

    /// Takes the role that [`agree`](crate::agree) gave to this process of a sharded run.
    pub fn role(mut self, role: ShardRole) -> Self {
        let ShardRole { id, rank, ranks, replicas, ties, only_named } = role;
        let (ties, only_named) = (Some(ties), Some(only_named));
        self.shard = Some(Sharding { rank, ranks, id, ties, replicas, only_named });
        self
    }

    /// Checks the options of a sharded run.
    ///
    /// # Errors
    /// [`Error::Setting`] for an option that a sharded run does not have.
    pub(super) fn check_sharding(&self) -> Result<()> {
        let Some(sharding) = &self.shard else { return Ok(()) };
        sharding.check()?;
        if cfg!(not(test)) {
            let reason = "storing of sharded runs is not part of this version yet";
            return Err(Error::Setting { option: "shard", reason: reason.into() });
        }
        if self.on_non_finite == OnNonFinite::Skip {
            let reason = "in a sharded run, a process that leaves out an update of its own would have another history \
                          than the others: choose `raise` or `ignore`";
            return Err(Error::Setting { option: "on_non_finite", reason: reason.into() });
        }
        if self.extend {
            let reason = "a sharded run keeps its tensors: resume it with all of them, or extend it in one process";
            return Err(Error::Setting { option: "extend", reason: reason.into() });
        }
        Ok(())
    }
}
