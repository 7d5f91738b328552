//! Tracker for a training loop: updates, snapshots, resume, Switch EMA.

mod agreement;
mod awaited;
mod checkpoint;
mod checkpoint_meta;
mod engine;
mod extend;
mod live;
mod live_source;
mod non_finite;
mod options;
mod regions;
mod registry;
#[cfg(feature = "cuda")]
mod replay;
mod resume;
mod rewind;
mod save_to;
mod settle;
mod shard_files;
mod shard_place;
mod sharding;
mod state;
mod tensor_choice;
mod thread;
mod unfinished;
mod values;
mod writer;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::compute::cpu::UpdateWeights;
use crate::error::{Error, Result};
use crate::fs::Lock;
use crate::math::{History, Profile, Schedule};
use crate::run::{SavedState, Settings};
use crate::snapshot::{Extension, Session};
use crate::tensor::{Parameters, TensorView};
pub use agreement::{ShardManifest, ShardRole, agree};
use engine::Engine;
use non_finite::NonFinitePolicy;
pub use non_finite::OnNonFinite;
pub use options::{OnError, Options};
use registry::TensorRegistry;
use settle::NewestUpdate;
use shard_place::ShardNumber;

/// Outcome of a call of [`PostHocEma::update`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateOutcome {
    /// No update was due.
    Skipped,
    /// The averages were updated. For parameters on a device, a later call may find that they were not, and then
    /// returns [`Error::NonFiniteParameter`] or warns.
    Updated,
    /// The averages were updated and a snapshot of each is being stored in the background.
    ///
    /// If storing fails, a later call of [`PostHocEma::update`], [`PostHocEma::save`] or [`PostHocEma::flush`] returns
    /// the error, [`PostHocEma::finish`] at the latest. Without [`Options::checkpoint_in_background`] the snapshots are
    /// on disk already.
    Stored,
}

/// Running averages of a model's parameters under several profiles, with regular snapshots in a run's directory.
///
/// Call [`PostHocEma::finish`] at the end. If it is dropped with updates that are not stored, a warning is logged.
///
/// ```
/// use posthoc_ema::{PostHocEma, Profile};
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let dir = dir.path().join("ema");
/// let mut weights = vec![("layer.weight", vec![0.0f32; 8])];
/// let mut ema = PostHocEma::options(&dir).sigma_rels([0.05, 0.28]).update_every(2).create(&weights)?;
/// for step in 0..100 {
///     weights[0].1.iter_mut().for_each(|w| *w += step as f32); // the optimiser's step
///     ema.update(&weights)?;
/// }
/// let average = ema.synthesize(Profile::sigma_rel(0.15)?)?;
/// assert_eq!(average.get("layer.weight").unwrap().shape, [8]);
/// ema.finish()?;
/// # Ok::<(), posthoc_ema::Error>(())
/// ```
pub struct PostHocEma {
    dir: PathBuf,
    settings: Settings,
    registry: TensorRegistry,
    /// Declared before the lock, so that it is dropped first: an engine's last writes happen under the lock.
    engine: Box<dyn Engine>,
    /// Time of the last call.
    clock: u64,
    /// Times of all updates before the newest, and of the newest once it is known that it was done.
    settled: History,
    /// Newest update, until it is in `settled` or was refused.
    newest: Option<NewestUpdate>,
    /// Newest step whose snapshots are, or are being, stored.
    stored: Option<u64>,
    /// True if the snapshots of the newest update failed and must be tried again.
    needs_retry: bool,
    /// Number of this process in a sharded run.
    shard: Option<ShardNumber>,
    /// Steps whose snapshots a sharded run keeps. Every process has the same ones.
    kept: BTreeSet<u64>,
    /// Time of the last call in the live state that a resume went on from.
    resumed_at: Option<u64>,
    /// Random id of the run, which every snapshot carries.
    run_id: String,
    /// Session of this process. None while the checkpoint of a process of an older version is completed.
    session: Option<Session>,
    /// Changes of the run's tensors, the oldest first.
    extensions: Vec<Extension>,
    /// Sessions before it that led to these averages.
    lineage: Vec<Session>,
    in_background: bool,
    on_error: OnError,
    /// True if the end without [`PostHocEma::finish`] is on purpose.
    is_abandoned: bool,
    non_finite: NonFinitePolicy,
    lock: Lock,
}

impl PostHocEma {
    /// Returns the default options of a run in `dir`; [`Options::create`] or [`Options::resume`] opens it.
    pub fn options(dir: impl AsRef<Path>) -> Options {
        Options::new(dir.as_ref())
    }

    /// Updates the averages and stores snapshots when they are due. Call it once after each training step.
    ///
    /// # Errors
    /// * [`Error::Changed`] if names, shapes or dtypes differ from those the run began with. The call has no effect.
    /// * [`Error::NonFiniteParameter`] if a parameter is NaN or infinite. The averages do not change, but the call
    ///   counts a step. See [`Options::on_non_finite`]. For parameters on a device, the error is that of an earlier
    ///   update, and this one is done.
    /// * [`Error::NonFinite`] if an average to be stored holds NaN or infinity. Nothing is written. For parameters on a
    ///   device, a later call returns this error.
    /// * [`Error::Io`] if an earlier snapshot could not be written in the background. The averages are updated all the
    ///   same, no file is half written, and training can go on. The snapshot is tried again before the next one; if
    ///   that fails too, it is dropped with a warning. Without [`Options::checkpoint_in_background`] the error is that
    ///   of this call's snapshot, which is tried again before the next update.
    /// * [`Error::LockLost`] if the run's lock was removed or its directory replaced. Nothing is stored any more, also
    ///   with [`OnError::Continue`].
    /// * [`Error::Tensor`] in a sharded run after an update that this process left out: see [`Options::shard`].
    /// * [`Error::Cuda`] if a device fails. The call has no effect. If the error says that an update was lost, nothing
    ///   more is stored: resume the run in a new process.
    pub fn update(&mut self, params: &(impl Parameters + ?Sized)) -> Result<UpdateOutcome> {
        let time = self.clock.checked_add(1).ok_or(Error::Time { time: self.clock, last: self.clock })?;
        self.update_at(time, params)
    }

    /// Does the same as [`PostHocEma::update`] on the caller's own clock: images, tokens, or steps counted elsewhere.
    ///
    /// Intervals are in units of that clock. They are due at the first call at or after each multiple.
    ///
    /// # Errors
    /// Those of [`PostHocEma::update`], and [`Error::Time`] unless `time` grows from call to call.
    pub fn update_at(&mut self, time: u64, params: &(impl Parameters + ?Sized)) -> Result<UpdateOutcome> {
        self.step_to(time, |tracker, is_due| {
            if is_due {
                params.with_tensors(&mut |views| tracker.fold(time, views))?;
            }
            Ok(true)
        })
    }

    /// Calls `act`, which updates the averages if it is due, and counts the step if it returns true.
    fn step_to(&mut self, time: u64, act: impl FnOnce(&mut Self, bool) -> Result<bool>) -> Result<UpdateOutcome> {
        let previous = self.clock;
        if time <= previous {
            return Err(Error::Time { time, last: previous });
        }
        self.non_finite.check_shared()?;
        let is_due = self.settings.schedule.is_update_due(previous, time);
        if is_due {
            self.settle_history()?;
            self.retry();
        }
        if !act(self, is_due)? {
            return Ok(UpdateOutcome::Skipped);
        }
        let mut outcome = if is_due { UpdateOutcome::Updated } else { UpdateOutcome::Skipped };
        self.clock = time;
        let is_snapshot_due = self.settings.schedule.is_snapshot_due(previous, time);
        if is_snapshot_due || !self.engine.looks_later() {
            self.settle_history()?;
            outcome = if self.settled.last() == Some(time) { outcome } else { UpdateOutcome::Skipped };
        }
        // Taken before another checkpoint is queued, whose errors belong to a later call.
        let earlier = self.non_finite.take_error();
        let earlier = earlier.and_then(|()| self.apply_error_policy(self.engine.take_error().map_or(Ok(()), Err)));
        // If the update was left out, the newest average may be stored already.
        let is_stored = outcome == UpdateOutcome::Skipped && self.stored == self.settled.last();
        if is_stored || !is_snapshot_due {
            return earlier.map(|()| outcome);
        }
        let stored = self.checkpoint();
        if stored.is_ok() {
            outcome = UpdateOutcome::Stored;
        }
        // Applied to each error: one that becomes a warning must not hide the other.
        earlier.and(self.apply_error_policy(stored)).map(|()| outcome)
    }

    /// Applies `on_error` to the result of storing: [`OnError::Continue`] turns file errors into warnings.
    fn apply_error_policy(&self, stored: Result<()>) -> Result<()> {
        match (stored, self.on_error) {
            (Err(error @ (Error::Io { .. } | Error::Unexpected { .. })), OnError::Continue) => {
                tracing::warn!("a snapshot could not be stored, the training goes on: {error}");
                Ok(())
            }
            (stored, _) => stored,
        }
    }

    /// Folds the parameters at `time` into every average, unless they have NaN.
    fn fold(&mut self, time: u64, views: &[TensorView<'_>]) -> Result<()> {
        let views = self.registry.order_views(views)?;
        let weights = self.weights(time);
        let looks = self.non_finite.looks();
        self.engine.fold(&views, self.registry.layout(), UpdateWeights::at(time, &weights), looks)?;
        if looks {
            self.newest = Some(NewestUpdate::new(time));
            return Ok(());
        }
        // Cannot fail once the averages have changed: the caller has checked that `time` is after the last update.
        self.settled.push(time)
    }

    /// Returns the weight of the parameters at `time` for each profile.
    fn weights(&self, time: u64) -> Vec<f32> {
        let last = self.settled.last().unwrap_or(0) as f64;
        self.settings.profiles.iter().map(|profile| profile.one_minus_beta(last, time as f64) as f32).collect()
    }

    /// Returns the fence to wait for before the parameters of the newest update are changed or freed.
    ///
    /// Only parameters lent [until the fence](crate::CudaMemory::until_fence) need it, and only if the averages are on
    /// the host. None if there is nothing to wait for. For parameters lent in the order of their stream, the stream
    /// itself waits.
    #[cfg(feature = "cuda")]
    pub fn fence(&self) -> Option<&crate::compute::cuda::Fence> {
        self.engine.fence()
    }

    /// Returns true if parameters that are lent [until the fence](crate::CudaMemory::until_fence) spare the training a
    /// wait for the bus.
    #[cfg(feature = "cuda")]
    pub fn needs_fence(&self) -> bool {
        self.engine.needs_fence()
    }

    /// Describes in words where the averages are, and how the parameters come there.
    ///
    /// It says if a training on a device waits for the bus: see [`Options::device_copy`].
    pub fn placement(&self) -> String {
        self.engine.placement()
    }

    /// Returns true if the next call of [`PostHocEma::update`] reads the parameters.
    pub fn is_due(&self) -> bool {
        self.settings.schedule.is_update_due(self.clock, self.clock.saturating_add(1))
    }

    /// Returns the schedule of the run.
    pub fn schedule(&self) -> Schedule {
        self.settings.schedule
    }

    /// Returns the step that a resume continues from; none if the directory holds no live state.
    ///
    /// # Errors
    /// [`Error::Damaged`] and [`Error::Io`] for a live state that cannot be read.
    pub fn saved_step(dir: impl AsRef<Path>) -> Result<Option<u64>> {
        Ok(SavedState::of(dir)?.map(|state| state.step))
    }

    /// Returns the time of the last call: the step that training continues from after a resume.
    pub fn step(&self) -> u64 {
        self.clock
    }

    /// Checks that the training is at the step that the averages have counted.
    ///
    /// Call it after a resume: a model and averages of different checkpoints do not fit together.
    ///
    /// # Errors
    /// [`Error::Step`], which names both steps.
    pub fn check_step(&self, step: u64) -> Result<()> {
        if step == self.clock { Ok(()) } else { Err(Error::Step { averages: self.clock, training: step }) }
    }

    /// Returns the tracked profiles.
    pub fn profiles(&self) -> &[Profile] {
        &self.settings.profiles
    }

    /// Returns the run's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl std::fmt::Debug for PostHocEma {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostHocEma")
            .field("dir", &self.dir)
            .field("clock", &self.clock)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
