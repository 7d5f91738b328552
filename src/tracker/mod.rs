//! What a training loop calls: updates, snapshots, resume, Switch EMA.

mod checkpoint;
mod engine;
mod live;
mod moment;
mod names;
mod options;
mod state;
mod table;
mod values;
mod writer;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::fs::Lock;
use crate::math::{History, Profile};
use crate::tensor::{Parameters, TensorView};

use crate::run::Settings;
use engine::Engine;
pub use options::{OnError, Options};
use table::TensorRegistry;

/// What a call of [`PostHocEma::update`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateOutcome {
    /// Nothing was due.
    Skipped,
    /// The averages were updated.
    Updated,
    /// The averages were updated and a snapshot of each is being stored in the background: should that fail, a later call
    /// of [`PostHocEma::update`], [`PostHocEma::save`] or [`PostHocEma::flush`] returns the error, [`PostHocEma::finish`] at
    /// the latest. Without [`Options::checkpoint_in_background`] it is on disk.
    Stored,
}

/// Running averages of a model's parameters under several profiles, stored now and then in a run's directory.
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
    table: TensorRegistry,
    /// Before the lock, and so dropped before it: what an engine still writes then is written under the lock.
    engine: Engine,
    /// The time of the last call.
    clock: u64,
    history: History,
    /// The newest step of which snapshots are, or are being, stored.
    stored: Option<u64>,
    /// Whether the snapshots of the newest update could not be stored and are still to be.
    pending: bool,
    /// Drawn at random when the run began; every snapshot carries it.
    run: String,
    in_background: bool,
    on_error: OnError,
    _lock: Lock,
}

impl PostHocEma {
    /// Begins to describe a run in `dir`; [`Options::create`] or [`Options::resume`] opens it.
    pub fn options(dir: impl AsRef<Path>) -> Options {
        Options::new(dir.as_ref())
    }

    /// To be called once after each training step: updates the averages and stores snapshots when they are due.
    ///
    /// # Errors
    /// [`Error::Changed`] where names, shapes or dtypes are not those the run began with: the call then did not happen.
    /// [`Error::NonFinite`] where an average to be stored holds NaN or infinity: nothing is written then. Of
    /// parameters on a device it is a later call that tells.
    /// [`Error::Io`] where an earlier snapshot could not be written in the background: the call has done its part, no file
    /// is half written, training can go on, and that snapshot is tried again before the next one, and given up with a
    /// warning if that fails too. Without [`Options::checkpoint_in_background`] it is the snapshot of this call, which is
    /// tried again before the next update.
    /// [`Error::Cuda`] where a device fails: the call then did not happen, or, where an update is said to be lost, nothing
    /// more is stored and the run is to be resumed by a new process.
    pub fn update(&mut self, params: &(impl Parameters + ?Sized)) -> Result<UpdateOutcome> {
        let time = self.clock.checked_add(1).ok_or(Error::Time { time: self.clock, last: self.clock })?;
        self.update_at(time, params)
    }

    /// As [`PostHocEma::update`], on a clock of the caller's own: images, tokens, or steps counted elsewhere.
    ///
    /// Intervals are in the units of that clock, and are due at the first call in or after each multiple.
    ///
    /// # Errors
    /// As [`PostHocEma::update`], and [`Error::Time`] unless `time` grows from call to call.
    pub fn update_at(&mut self, time: u64, params: &(impl Parameters + ?Sized)) -> Result<UpdateOutcome> {
        let previous = self.clock;
        if time <= previous {
            return Err(Error::Time { time, last: previous });
        }
        let mut step = UpdateOutcome::Skipped;
        if self.settings.schedule.is_update_due(previous, time) {
            self.retry();
            params.with_tensors(&mut |views| self.fold(time, views))?;
            step = UpdateOutcome::Updated;
        }
        self.clock = time;
        // Asked for before another checkpoint is queued: what becomes of that is a later call's to tell.
        let earlier = self.engine.take_error().map_or(Ok(()), Err);
        if !self.settings.schedule.is_snapshot_due(previous, time) {
            return self.apply_error_policy(earlier).map(|()| step);
        }
        let stored = self.checkpoint();
        let step = if stored.is_ok() { UpdateOutcome::Stored } else { step };
        // Each for itself: one that the training goes on with must not hide another.
        self.apply_error_policy(earlier).and(self.apply_error_policy(stored)).map(|()| step)
    }

    /// What of the storing an update returns.
    fn apply_error_policy(&self, stored: Result<()>) -> Result<()> {
        match (stored, self.on_error) {
            (Err(error @ (Error::Io { .. } | Error::Unexpected { .. })), OnError::Continue) => {
                tracing::warn!("the training goes on: {error}");
                Ok(())
            }
            (stored, _) => stored,
        }
    }

    /// Folds the parameters at `time` into every average.
    fn fold(&mut self, time: u64, views: &[TensorView<'_>]) -> Result<()> {
        let matched = self.table.match_views(views)?;
        let last = self.history.last().unwrap_or(0);
        let weight = |profile: &Profile| profile.gain(last as f64, time as f64) as f32;
        let weights: Vec<f32> = self.settings.profiles.iter().map(weight).collect();
        self.engine.fold(&matched, self.table.layout(), &weights)?;
        // After the last update, as the caller has checked, so that it cannot fail where the averages have moved.
        self.history.push(time)
    }

    /// What whoever trains waits for before the parameters of the newest update are changed or freed, where they were lent
    /// until then ([`CudaMemory::until_fence`](crate::CudaMemory::until_fence)) and the averages are kept on the host.
    ///
    /// None where there is nothing to wait for. Parameters that are lent in the order of their stream need no fence: the
    /// stream itself waits.
    #[cfg(feature = "cuda")]
    pub fn fence(&self) -> Option<&crate::compute::cuda::Fence> {
        self.engine.fence()
    }

    /// Whether the next call of [`PostHocEma::update`] reads the parameters.
    pub fn is_due(&self) -> bool {
        self.settings.schedule.is_update_due(self.clock, self.clock.saturating_add(1))
    }

    /// The step from which a resume would go on, of a run that has a live state: for who only counts along.
    ///
    /// # Errors
    /// [`Error::Damaged`] and [`Error::Io`] for a state that cannot be read.
    pub fn saved_step(dir: impl AsRef<Path>) -> Result<Option<u64>> {
        let path = dir.as_ref().join(crate::snapshot::STATE_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        crate::run::Saved::read(&path).map(|saved| Some(saved.step()))
    }

    /// The time of the last call: where training goes on after a resume.
    pub fn step(&self) -> u64 {
        self.clock
    }

    /// The profiles that are tracked.
    pub fn profiles(&self) -> &[Profile] {
        &self.settings.profiles
    }

    /// The updates so far.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The run's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl std::fmt::Debug for PostHocEma {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (dir, clock, settings) = (&self.dir, &self.clock, &self.settings);
        f.debug_struct("PostHocEma")
            .field("dir", dir)
            .field("clock", clock)
            .field("settings", settings)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
