//! The options of a run, with the defaults that users of the existing tools know.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::engine::{Engine, EngineConfig, model_device};
use super::names::{Choice, Names};
use super::table::TensorRegistry;
use super::{PostHocEma, state};
use crate::compute::cpu::Precision;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::math::{History, Profile, Retention, Schedule};
use crate::run::{Saved, Settings};
use crate::snapshot::{self, STATE_FILE};

use crate::fs::Lock;
use crate::tensor::Parameters;

/// A profile as it was asked for; it is checked when the run is opened.
#[derive(Clone, Debug)]
enum Track {
    SigmaRel(f64),
    Gamma(f64),
    Beta(f64),
    HalfLife(f64),
    Profile(Profile),
}

impl Track {
    fn profile(&self) -> Result<Profile> {
        match self {
            Track::SigmaRel(sigma_rel) => Profile::sigma_rel(*sigma_rel),
            Track::Gamma(gamma) => Profile::gamma(*gamma),
            Track::Beta(beta) => Profile::beta(*beta),
            Track::HalfLife(steps) => Profile::half_life(*steps),
            Track::Profile(profile) => Ok(profile.clone()),
        }
    }
}

/// A run that is about to be created or resumed. What is not set keeps its default, on a resume what the run has.
#[derive(Clone, Debug)]
#[must_use = "nothing happens before `create` or `resume`"]
pub struct Options {
    dir: PathBuf,
    tracks: Vec<Track>,
    update_every: Option<u64>,
    update_after_step: Option<u64>,
    checkpoint_every: Option<u64>,
    max_checkpoints: Option<usize>,
    retention: Option<Retention>,
    checkpoint_dtype: Option<Option<Dtype>>,
    precision: Option<Precision>,
    shard_size: Option<u64>,
    average: Option<Vec<String>>,
    copy: Option<Vec<String>>,
    leave_out: Option<Vec<String>>,
    device: Device,
    in_background: bool,
    on_error: OnError,
}

/// What an update does where a snapshot could not be stored: a full disk, a directory that is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// It returns the error; the training may go on or stop.
    #[default]
    Stop,
    /// It logs a warning and the training goes on: the averages lose nothing, and the snapshot is tried again as always.
    /// [`PostHocEma::save`], [`PostHocEma::flush`] and [`PostHocEma::finish`] return errors nevertheless.
    Continue,
}

impl Options {
    pub(super) fn new(dir: &Path) -> Options {
        Options {
            dir: dir.to_owned(),
            tracks: Vec::new(),
            update_every: None,
            update_after_step: None,
            checkpoint_every: None,
            max_checkpoints: None,
            retention: None,
            checkpoint_dtype: None,
            precision: None,
            shard_size: None,
            average: None,
            copy: None,
            leave_out: None,
            device: Device::Cpu,
            in_background: true,
            on_error: OnError::Stop,
        }
    }

    /// Tracks power-function profiles of these relative standard deviations. Default: 0.05 and 0.28.
    ///
    /// Calls add up, this one and those of the other parametrisations.
    pub fn sigma_rels(self, sigma_rels: impl IntoIterator<Item = f64>) -> Self {
        self.track(sigma_rels.into_iter().map(Track::SigmaRel))
    }

    /// Tracks power-function profiles of these exponents.
    pub fn gammas(self, gammas: impl IntoIterator<Item = f64>) -> Self {
        self.track(gammas.into_iter().map(Track::Gamma))
    }

    /// Tracks exponential profiles (classical EMA) of these decays per step, whatever the interval of updates.
    pub fn betas(self, betas: impl IntoIterator<Item = f64>) -> Self {
        self.track(betas.into_iter().map(Track::Beta))
    }

    /// Tracks exponential profiles of these half-lives in steps.
    pub fn half_lives(self, half_lives: impl IntoIterator<Item = f64>) -> Self {
        self.track(half_lives.into_iter().map(Track::HalfLife))
    }

    /// Tracks these profiles.
    pub fn profiles(self, profiles: impl IntoIterator<Item = Profile>) -> Self {
        self.track(profiles.into_iter().map(Track::Profile))
    }

    fn track(mut self, tracks: impl Iterator<Item = Track>) -> Self {
        self.tracks.extend(tracks);
        self
    }

    /// Steps between updates. Default: 10.
    pub fn update_every(mut self, steps: u64) -> Self {
        self.update_every = Some(steps);
        self
    }

    /// No update before this step. Default: 0.
    pub fn update_after_step(mut self, step: u64) -> Self {
        self.update_after_step = Some(step);
        self
    }

    /// Steps between snapshots; the averages are updated at each. Default: 1000.
    pub fn checkpoint_every(mut self, steps: u64) -> Self {
        self.checkpoint_every = Some(steps);
        self
    }

    /// How many steps' snapshots are kept. Default: 20.
    pub fn max_checkpoints(mut self, steps: usize) -> Self {
        self.max_checkpoints = Some(steps);
        self
    }

    /// Which steps' snapshots are kept. Default: those that serve all lengths from 0.05 to 0.28 best.
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = Some(retention);
        self
    }

    /// The dtype of averages in snapshots. Default: each tensor's own. A tensor with a value beyond its dtype is kept
    /// in f32 instead, with a warning.
    pub fn checkpoint_dtype(mut self, dtype: impl Into<Option<Dtype>>) -> Self {
        self.checkpoint_dtype = Some(dtype.into());
        self
    }

    /// How running averages are kept. Default: compensated.
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = Some(precision);
        self
    }

    /// The size in bytes beyond which a snapshot is split into shards. Default: 5 GB.
    pub fn shard_size(mut self, bytes: u64) -> Self {
        self.shard_size = Some(bytes);
        self
    }

    /// Tensors, by name or glob (`*.lora_*`), to average. Default: all of floating-point dtypes; where names are given,
    /// the others are copied.
    pub fn average<S: Into<String>>(mut self, globs: impl IntoIterator<Item = S>) -> Self {
        self.average = Some(globs.into_iter().map(Into::into).collect());
        self
    }

    /// Tensors, by name or glob (`*.running_mean`), to copy from the newest update instead of averaging them.
    pub fn copy<S: Into<String>>(mut self, globs: impl IntoIterator<Item = S>) -> Self {
        self.copy = Some(globs.into_iter().map(Into::into).collect());
        self
    }

    /// Tensors, by name or glob, to leave out altogether.
    pub fn leave_out<S: Into<String>>(mut self, globs: impl IntoIterator<Item = S>) -> Self {
        self.leave_out = Some(globs.into_iter().map(Into::into).collect());
        self
    }

    /// Where the averages of parameters on a CUDA device are kept. Default: [`Device::Cpu`].
    ///
    /// * [`Device::Cpu`]: on the host. Each update copies the parameters there once, in their own dtype; the stream that
    ///   trains waits for the copy but not for the folding, and not for the copy either where they are lent until the
    ///   fence ([`CudaMemory::until_fence`](crate::CudaMemory)). The device gives no memory.
    /// * [`Device::Cuda`]: on the parameters' device; an update is one launch on the stream that trains.
    /// * [`Device::Auto`]: on the device where they take at most a quarter of its free memory, otherwise on the host.
    ///
    /// The averages are the same, bit for bit, and a resume may choose anew. For parameters in host memory the averages
    /// stay there too; to ask for a device then is an [`Error::Setting`].
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Whether snapshots are written in the background, while the training goes on. Default: true.
    ///
    /// The training is then held up for a copy of the averages, whose memory (6 bytes a parameter and profile, 4 with
    /// [`Precision::Plain`], and the copied tensors) is the price: on the host it is taken when the run is opened, and
    /// between checkpoints the system may give it to others. There is one such copy: a checkpoint that comes before the
    /// last one is written waits for it. Where the memory cannot be had, and with `false`, the training waits until the
    /// snapshots are on disk. Parameters on a device are copied beside the training, and a second checkpoint may wait.
    ///
    /// The files are the same, and a resume may choose anew.
    pub fn checkpoint_in_background(mut self, yes: bool) -> Self {
        self.in_background = yes;
        self
    }

    /// What an update does where a snapshot could not be stored. Default: it returns the error. A resume may choose anew.
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.on_error = on_error;
        self
    }

    /// Begins a new run.
    ///
    /// # Errors
    /// [`Error::RunExists`] where the directory already holds one, [`Error::Parameter`], [`Error::NotTrackable`] or
    /// [`Error::Setting`] for options that make no sense, [`Error::Tensor`] for a tensor that cannot be averaged,
    /// [`Error::Locked`], [`Error::Io`] and [`Error::Cuda`].
    pub fn create(self, params: &(impl Parameters + ?Sized)) -> Result<PostHocEma> {
        let settings = self.settings(Settings::default())?;
        settings.check()?;
        let (mut table, mut device) = (TensorRegistry::default(), None);
        params.with_tensors(&mut |views| {
            let choice = choice(&settings)?;
            choice.check(views)?;
            table = TensorRegistry::new(views, &choice)?;
            device = model_device(table.match_views(views)?.all())?;
            Ok(())
        })?;
        state::check_header(&table, &settings)?;
        let make = || fs::create_dir_all(&self.dir);
        crate::fs::fail_point(&self.dir).and_then(|()| make()).map_err(Error::io("create", &self.dir))?;
        snapshot::check_empty(&self.dir)?;
        let lock = Lock::acquire(&self.dir)?;
        snapshot::check_empty(&self.dir)?;
        snapshot::remove_leftovers(&self.dir)?;
        let start = EngineConfig::new(&table, &settings);
        let engine = Engine::start(&self.dir, table.layout(), device, self.device, start)?;
        if self.in_background {
            engine.prepare();
        }
        Ok(PostHocEma {
            dir: self.dir,
            engine,
            settings,
            table,
            clock: 0,
            history: History::default(),
            stored: None,
            pending: false,
            run: snapshot::new_run_id(),
            in_background: self.in_background,
            on_error: self.on_error,
            _lock: lock,
        })
    }

    /// Goes on with a run from its newest live state; [`PostHocEma::step`] tells where that is.
    ///
    /// Schedule, retention, dtype and shard size may be changed; profiles, precision and the choice of tensors may not.
    ///
    /// # Errors
    /// [`Error::NoRun`] without a live state, [`Error::Setting`] for an option that contradicts the run,
    /// [`Error::Changed`] or [`Error::Tensor`] for other parameters, [`Error::Unexpected`] for snapshots that are not of
    /// this run, [`Error::Damaged`], [`Error::Locked`], [`Error::Io`] and [`Error::Cuda`].
    pub fn resume(self, params: &(impl Parameters + ?Sized)) -> Result<PostHocEma> {
        let path = self.dir.join(STATE_FILE);
        if !path.is_file() {
            let snapshots = self.dir.is_dir() && snapshot::any_part(&self.dir)?.is_some();
            let but = if snapshots { "snapshots but " } else { "" };
            return Err(Error::NoRun { path: self.dir, reason: format!("{but}no {STATE_FILE} to go on from") });
        }
        let lock = Lock::acquire(&self.dir)?;
        let saved = Saved::read(&path)?;
        let settings = self.settings(saved.settings.clone())?;
        settings.check()?;
        saved.settings.check_unchanged(&settings)?;
        let (mut table, mut device) = (TensorRegistry::default(), None);
        params.with_tensors(&mut |views| {
            table = TensorRegistry::resumed(views, &choice(&settings)?, &saved.tied)?;
            device = model_device(table.match_views(views)?.all())?;
            Ok(())
        })?;
        let mut tracker = saved.into_tracker(self.dir, settings, table, device, self.device, lock)?;
        (tracker.in_background, tracker.on_error) = (self.in_background, self.on_error);
        if self.in_background {
            tracker.engine.prepare();
        }
        snapshot::remove_leftovers(&tracker.dir)?;
        tracker.complete()?;
        Ok(tracker)
    }

    /// Goes on with a run where there is one, and begins a new one otherwise: what a job that may be restarted calls.
    ///
    /// # Errors
    /// As [`Options::create`] and [`Options::resume`].
    pub fn resume_or_create(self, params: &(impl Parameters + ?Sized)) -> Result<PostHocEma> {
        if self.dir.join(STATE_FILE).exists() { self.resume(params) } else { self.create(params) }
    }

    /// What was set, over what holds otherwise.
    fn settings(&self, base: Settings) -> Result<Settings> {
        let mut profiles: Vec<Profile> = self.tracks.iter().map(Track::profile).collect::<Result<_>>()?;
        if profiles.is_empty() {
            profiles = base.profiles;
        }
        if profiles.is_empty() {
            profiles = vec![Profile::sigma_rel(0.05)?, Profile::sigma_rel(0.28)?];
        }
        let schedule = Schedule {
            update_every: self.update_every.unwrap_or(base.schedule.update_every),
            update_after_step: self.update_after_step.unwrap_or(base.schedule.update_after_step),
            checkpoint_every: self.checkpoint_every.unwrap_or(base.schedule.checkpoint_every),
        };
        Ok(Settings {
            profiles,
            schedule,
            max_checkpoints: self.max_checkpoints.unwrap_or(base.max_checkpoints),
            retention: self.retention.clone().unwrap_or(base.retention),
            checkpoint_dtype: self.checkpoint_dtype.unwrap_or(base.checkpoint_dtype),
            precision: self.precision.unwrap_or(base.precision),
            shard_size: self.shard_size.unwrap_or(base.shard_size),
            average: self.average.clone().or(base.average),
            copy: self.copy.clone().unwrap_or(base.copy),
            leave_out: self.leave_out.clone().unwrap_or(base.leave_out),
        })
    }
}

/// Reads the globs of the settings.
fn choice(settings: &Settings) -> Result<Choice> {
    Ok(Choice {
        average: settings.average.as_ref().map(|patterns| Names::new("average", patterns)).transpose()?,
        copy: Names::new("copy", &settings.copy)?,
        leave_out: Names::new("leave_out", &settings.leave_out)?,
    })
}
