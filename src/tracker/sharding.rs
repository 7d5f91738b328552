//! Sharded runs: the place of this process among those that track one model together.

use std::collections::BTreeSet;

use super::agreement::ShardRole;
use super::shard_place::Sharding;
use super::{OnNonFinite, Options};
use crate::error::{Error, Result};
use crate::fs::Lock;
use crate::snapshot::Session;

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

    /// Returns true if this process repairs the run at its opening: the only one, or the first of a sharded run.
    pub(super) fn repairs(&self) -> bool {
        self.shard.as_ref().is_none_or(|sharding| sharding.number().is_first())
    }

    /// Locks the run: for this process alone, or against all but the other processes of a sharded run.
    ///
    /// # Errors
    /// Those of [`Lock::acquire`], and [`Error::Unexpected`] if the first process has not opened the run.
    pub(super) fn lock(&self) -> Result<Lock> {
        let Some(sharding) = &self.shard else { return Lock::acquire(&self.dir) };
        if !self.repairs() && !Lock::has_been_taken(&self.dir) {
            let why = "the process of rank 0 has not opened the run here: open it there first, in a directory that all \
                       processes share";
            return Err(Error::unexpected(&self.dir, why));
        }
        if self.repairs() {
            // Fails while any process of an earlier start is alive, since all of them hold this lock.
            drop(Lock::acquire(&self.dir)?);
        }
        Lock::acquire_shared(&self.dir, sharding.rank.map(|rank| rank + 1))
    }

    /// Begins a session after session number `previous`, which all processes of a sharded run share.
    pub(super) fn begin_session(&self, previous: u64, from: u64) -> Session {
        let session = Session::begin(previous, from);
        match &self.shard {
            Some(Sharding { id, .. }) => Session { id: id.clone(), ..session },
            None => session,
        }
    }

    /// Checks the options of a sharded run.
    ///
    /// # Errors
    /// [`Error::Setting`] for an option that a sharded run does not have.
    pub(super) fn check_sharding(&self) -> Result<()> {
        let Some(sharding) = &self.shard else { return Ok(()) };
        sharding.check()?;
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
