//! Options of a run, with the defaults that users of the existing tools know.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::engine::{self, EngineConfig};
use super::non_finite::{NonFinitePolicy, OnNonFinite};
use super::registry::TensorRegistry;
use super::shard_place::Sharding;
use super::tensor_choice::TensorChoice;
use super::{PostHocEma, state};
use crate::compute::cpu::Precision;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::fs::{Lock, attempt, start_threads};
use crate::math::{History, Profile, Retention, Schedule};
use crate::run::Settings;
use crate::snapshot::{self, STATE_FILE};
use crate::tensor::{Parameters, TensorView};

/// Profile as the user gave it; it is checked when the run is opened.
#[derive(Clone, Debug)]
enum ProfileSpec {
    SigmaRel(f64),
    Gamma(f64),
    Beta(f64),
    HalfLife(f64),
    Profile(Profile),
}

impl ProfileSpec {
    fn profile(&self) -> Result<Profile> {
        match self {
            ProfileSpec::SigmaRel(sigma_rel) => Profile::sigma_rel(*sigma_rel),
            ProfileSpec::Gamma(gamma) => Profile::gamma(*gamma),
            ProfileSpec::Beta(beta) => Profile::beta(*beta),
            ProfileSpec::HalfLife(steps) => Profile::half_life(*steps),
            ProfileSpec::Profile(profile) => Ok(profile.clone()),
        }
    }
}

/// Options of a run to be created or resumed.
///
/// An option that is not set keeps its default, or on a resume the run's own value.
#[derive(Clone, Debug)]
#[must_use = "nothing happens before `create` or `resume`"]
pub struct Options {
    pub(super) dir: PathBuf,
    profiles: Vec<ProfileSpec>,
    update_every: Option<u64>,
    update_after_step: Option<u64>,
    checkpoint_every: Option<u64>,
    snapshot_growth: Option<Option<f64>>,
    max_checkpoints: Option<usize>,
    retention: Option<Retention>,
    checkpoint_dtype: Option<Option<Dtype>>,
    precision: Option<Precision>,
    shard_size: Option<u64>,
    pub(super) average: Option<Vec<String>>,
    pub(super) copy: Option<Vec<String>>,
    pub(super) leave_out: Option<Vec<String>>,
    pub(super) device: Device,
    pub(super) device_copy: Option<bool>,
    pub(super) in_background: bool,
    pub(super) on_error: OnError,
    pub(super) on_non_finite: OnNonFinite,
    pub(super) extend: bool,
    pub(super) shard: Option<Sharding>,
}

/// Reaction of an update to a snapshot that cannot be stored, for example because the disk is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// Returns the error; the caller may go on training or stop.
    #[default]
    Stop,
    /// Logs a warning and goes on. The averages lose nothing, and the snapshot is tried again as with
    /// [`OnError::Stop`]. [`PostHocEma::save`], [`PostHocEma::flush`] and [`PostHocEma::finish`] still return errors,
    /// and so do all of [`Error::LockLost`].
    Continue,
}

impl Options {
    pub(super) fn new(dir: &Path) -> Options {
        Options {
            dir: dir.to_owned(),
            profiles: Vec::new(),
            update_every: None,
            update_after_step: None,
            checkpoint_every: None,
            snapshot_growth: None,
            max_checkpoints: None,
            retention: None,
            checkpoint_dtype: None,
            precision: None,
            shard_size: None,
            average: None,
            copy: None,
            leave_out: None,
            device: Device::Cpu,
            device_copy: None,
            in_background: true,
            on_error: OnError::Stop,
            on_non_finite: OnNonFinite::default(),
            extend: false,
            shard: None,
        }
    }

    /// Tracks power-function profiles of these relative standard deviations. Default: 0.05 and 0.28.
    ///
    /// Calls add up, also with those of the other parametrisations.
    pub fn sigma_rels(self, sigma_rels: impl IntoIterator<Item = f64>) -> Self {
        self.track(sigma_rels.into_iter().map(ProfileSpec::SigmaRel))
    }

    /// Tracks power-function profiles of these exponents.
    pub fn gammas(self, gammas: impl IntoIterator<Item = f64>) -> Self {
        self.track(gammas.into_iter().map(ProfileSpec::Gamma))
    }

    /// Tracks exponential profiles (classical EMA) of these decays per step, whatever the interval of updates.
    pub fn betas(self, betas: impl IntoIterator<Item = f64>) -> Self {
        self.track(betas.into_iter().map(ProfileSpec::Beta))
    }

    /// Tracks exponential profiles of these half-lives in steps.
    pub fn half_lives(self, half_lives: impl IntoIterator<Item = f64>) -> Self {
        self.track(half_lives.into_iter().map(ProfileSpec::HalfLife))
    }

    /// Tracks these profiles.
    pub fn profiles(self, profiles: impl IntoIterator<Item = Profile>) -> Self {
        self.track(profiles.into_iter().map(ProfileSpec::Profile))
    }

    fn track(mut self, specs: impl Iterator<Item = ProfileSpec>) -> Self {
        self.profiles.extend(specs);
        self
    }

    /// Steps between updates. Default: 10.
    pub fn update_every(mut self, steps: u64) -> Self {
        self.update_every = Some(steps);
        self
    }

    /// Step before which no update happens. Default: 0.
    pub fn update_after_step(mut self, step: u64) -> Self {
        self.update_after_step = Some(step);
        self
    }

    /// Steps between snapshots; the averages are updated at each. Default: 1000.
    pub fn checkpoint_every(mut self, steps: u64) -> Self {
        self.checkpoint_every = Some(steps);
        self
    }

    /// Factor between the times of further snapshots early in the training; `None` or 0 for none. Default: 1.2.
    ///
    /// Multiples of `checkpoint_every` alone serve a short training badly: after a single snapshot, averages are off by
    /// up to 45%. Early snapshots are written at the tenth update, or at `update_after_step` if that is later, and then
    /// each time the training is longer by the factor, until that takes `checkpoint_every`. With the defaults these are
    /// 22, before step 5,000. A run of an older version has none when it is resumed.
    pub fn snapshot_growth(mut self, factor: impl Into<Option<f64>>) -> Self {
        self.snapshot_growth = Some(factor.into().filter(|factor| *factor != 0.0));
        self
    }

    /// Largest number of steps whose snapshots are kept. Default: 20.
    pub fn max_checkpoints(mut self, steps: usize) -> Self {
        self.max_checkpoints = Some(steps);
        self
    }

    /// Rule for the steps whose snapshots are kept. Default: those that serve all `sigma_rel` from 0.05 to 0.28 best.
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = Some(retention);
        self
    }

    /// Dtype of averages in snapshots. Default: each tensor's own.
    ///
    /// A tensor with a value beyond the range of that dtype is kept in f32 instead, with a warning.
    pub fn checkpoint_dtype(mut self, dtype: impl Into<Option<Dtype>>) -> Self {
        self.checkpoint_dtype = Some(dtype.into());
        self
    }

    /// Precision of the running averages. Default: compensated.
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = Some(precision);
        self
    }

    /// Size in bytes beyond which a snapshot is split into shards. Default: 5 GB.
    pub fn shard_size(mut self, bytes: u64) -> Self {
        self.shard_size = Some(bytes);
        self
    }

    /// Tensors to average, by name or glob (`*.lora_*`).
    ///
    /// Default: all parameters of floating-point dtypes, and of the [buffers](TensorView::as_buffer) the batch-norm
    /// statistics, `running_mean` and `running_var`. If a name or glob matches a parameter, all tensors without a match
    /// are copied. If all match buffers only, these are averaged besides the default.
    pub fn average<S: Into<String>>(mut self, globs: impl IntoIterator<Item = S>) -> Self {
        self.average = Some(globs.into_iter().map(Into::into).collect());
        self
    }

    /// Tensors to copy from the newest update instead of averaging them, by name or glob (`*.running_mean`).
    pub fn copy<S: Into<String>>(mut self, globs: impl IntoIterator<Item = S>) -> Self {
        self.copy = Some(globs.into_iter().map(Into::into).collect());
        self
    }

    /// Tensors to leave out altogether, by name or glob.
    pub fn leave_out<S: Into<String>>(mut self, globs: impl IntoIterator<Item = S>) -> Self {
        self.leave_out = Some(globs.into_iter().map(Into::into).collect());
        self
    }

    /// Device that keeps the averages of parameters on a CUDA device. Default: [`Device::Cpu`].
    ///
    /// * [`Device::Cpu`]: on the host. Each update copies the parameters there once, in their own dtype. The training
    ///   stream waits for the copy but not for the folding. It does not wait for the copy either if the parameters are
    ///   lent until the fence ([`CudaMemory::until_fence`](crate::CudaMemory)). With [`Options::device_copy`] it waits
    ///   for a copy within the device only.
    /// * [`Device::AnyCuda`]: on the parameters' device. An update is one launch on the training stream, after a look
    ///   for NaN. [`Device::Cuda`] is the same, and an error if the parameters are on another device.
    /// * [`Device::Auto`]: on the device if the averages take at most a quarter of the memory that the training leaves
    ///   free, otherwise on the host. The choice is made when the run is opened, when gradients and the optimizer's
    ///   state often do not exist yet: 12 bytes a parameter count as taken by them.
    ///
    /// The averages are the same, bit for bit, and a resume may choose differently. The averages of parameters in host
    /// memory stay there; choosing a device for them is an [`Error::Setting`].
    ///
    /// The parameters may be on several devices and in host memory. [`Device::AnyCuda`] then keeps each tensor's
    /// averages beside it, [`Device::Auto`] does if every device has room for its own, and [`Device::Cuda`] is an
    /// [`Error::Setting`]. With averages beside the parameters, an update waits until all devices have looked for NaN.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Copies the parameters within their device at each update, on the way to averages on the host. Default: `None`,
    /// which does so if they take at most a quarter of the memory that the training leaves free (see
    /// [`Options::device`]).
    ///
    /// The training stream then waits for this copy, and not for the bus. The memory is
    /// allocated when the run is opened. `true` makes it an error if the device has too little, `false` allocates at
    /// most 32 MiB, for small tensors. Without effect if averages and parameters are in the same memory.
    /// [`PostHocEma::placement`] says which way is used.
    pub fn device_copy(mut self, yes: impl Into<Option<bool>>) -> Self {
        self.device_copy = yes.into();
        self
    }

    /// Writes snapshots in the background while the training goes on. Default: true.
    ///
    /// The training then waits only for a copy of the averages. The copy takes 6 bytes per parameter and profile, 4
    /// with [`Precision::Plain`], plus the copied tensors. On the host this memory is allocated when the run is opened,
    /// and the system may use it between checkpoints. There is one such copy: a checkpoint waits until the one before
    /// is written. If the memory is not available, and with `false`, the training waits until the snapshots are on
    /// disk. Parameters on a device are copied beside the training, and a second checkpoint may be queued.
    ///
    /// The files are the same, and a resume may choose differently.
    pub fn checkpoint_in_background(mut self, yes: bool) -> Self {
        self.in_background = yes;
        self
    }

    /// Reaction of an update to a snapshot that cannot be stored. Default: [`OnError::Stop`].
    ///
    /// A resume may choose differently.
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.on_error = on_error;
        self
    }

    /// Resumes with a model that has other tensors than the run: new layers, adapters, resized embeddings, unfrozen
    /// parameters, another dtype. Default: false, which refuses such a model.
    ///
    /// The averages of new tensors begin at the newest update of the run with their present values. A tensor that the
    /// model lacks stays in the snapshots that have it. A tensor of another shape ends, and begins again. The choice of
    /// tensors may change, too. [`Plan::later`](crate::Plan::later) says since when a tensor is averaged.
    pub fn extend(mut self, yes: bool) -> Self {
        self.extend = yes;
        self
    }

    /// Reaction of an update to parameters with NaN or infinity. Default: [`OnNonFinite::Raise`].
    ///
    /// The look reads each parameter that is averaged once more, before any average changes. A resume may choose
    /// differently.
    ///
    /// On a device, it is a second launch on the training stream, and the next update that is due waits for its result.
    /// So the training is at most one update ahead of the device, and does not wait if updates are a few steps apart. A
    /// call that stores snapshots waits for its own update.
    pub fn on_non_finite(mut self, on_non_finite: OnNonFinite) -> Self {
        self.on_non_finite = on_non_finite;
        self
    }

    /// Creates a new run.
    ///
    /// # Errors
    /// * [`Error::RunExists`] if the directory already holds a run.
    /// * [`Error::Parameter`], [`Error::NotTrackable`] or [`Error::Setting`] for an invalid option.
    /// * [`Error::Tensor`] for a tensor that cannot be averaged, [`Error::NothingToAverage`] if none can.
    /// * [`Error::Locked`], [`Error::LockedHere`], [`Error::Io`], [`Error::Threads`] and [`Error::Cuda`].
    pub fn create(self, params: &(impl Parameters + ?Sized)) -> Result<PostHocEma> {
        self.check_sharding()?;
        let settings = self.settings(Settings::default())?;
        settings.check()?;
        start_threads()?;
        let (registry, places) = register(params, |views| {
            let choice = TensorChoice::new(&settings)?;
            if self.shard.is_none() {
                choice.check(views)?;
            }
            TensorRegistry::new(views, &choice, self.shard.as_ref())
        })?;
        let non_finite = NonFinitePolicy::new(self.on_non_finite, self.shard.is_some());
        state::check_header(&registry, &settings)?;
        let lock = self.lock_empty()?;
        let config = EngineConfig { device_copy: self.device_copy, ..EngineConfig::new(&registry, &settings) };
        let engine = engine::start(&self.dir, registry.layout(), &places, self.device, config)?;
        if self.in_background {
            engine.prepare();
        }
        Ok(PostHocEma {
            dir: self.dir.clone(),
            engine,
            settings,
            registry,
            clock: 0,
            settled: History::default(),
            newest: None,
            stored: None,
            needs_retry: false,
            run_id: self.shard.as_ref().map_or_else(snapshot::new_run_id, |sharding| sharding.id.clone()),
            shard: self.shard.as_ref().map(Sharding::number),
            kept: BTreeSet::new(),
            resumed_at: None,
            session: Some(self.begin_session(0, 0)),
            extensions: Vec::new(),
            lineage: Vec::new(),
            in_background: self.in_background,
            on_error: self.on_error,
            is_abandoned: false,
            non_finite,
            lock,
        })
    }

    /// Creates the directory of a new run and locks it.
    fn lock_empty(&self) -> Result<Lock> {
        if !self.repairs() {
            let lock = self.lock()?;
            snapshot::check_empty(&self.dir)?;
            return Ok(lock);
        }
        self.create_dir()?;
        snapshot::check_empty(&self.dir)?;
        let lock = self.lock()?;
        snapshot::check_empty(&self.dir)?;
        snapshot::recover(&self.dir)?;
        snapshot::remove_leftovers(&self.dir)?;
        Ok(lock)
    }

    pub(super) fn create_dir(&self) -> Result<()> {
        attempt("create", &self.dir, || fs::create_dir_all(&self.dir))
    }

    /// Returns the error of a directory without a live state.
    pub(super) fn no_state(self) -> Error {
        let snapshot = if self.dir.is_dir() { snapshot::any_snapshot_file(&self.dir) } else { Ok(None) };
        let but = match snapshot {
            Ok(Some(_)) => "snapshots but ",
            Ok(None) => "",
            Err(error) => return error,
        };
        Error::NoRun { path: self.dir, reason: format!("{but}no {STATE_FILE} to resume from") }
    }

    /// Returns `base` with the options that were set.
    pub(super) fn settings(&self, base: Settings) -> Result<Settings> {
        let mut profiles: Vec<Profile> = self.profiles.iter().map(ProfileSpec::profile).collect::<Result<_>>()?;
        // Equal profiles may be stored in another unit; those of the run keep its bits.
        if profiles.is_empty() || profiles == base.profiles {
            profiles = base.profiles;
        }
        if profiles.is_empty() {
            profiles = vec![Profile::sigma_rel(0.05)?, Profile::sigma_rel(0.28)?];
        }
        let schedule = Schedule {
            update_every: self.update_every.unwrap_or(base.schedule.update_every),
            update_after_step: self.update_after_step.unwrap_or(base.schedule.update_after_step),
            checkpoint_every: self.checkpoint_every.unwrap_or(base.schedule.checkpoint_every),
            snapshot_growth: self.snapshot_growth.unwrap_or(base.schedule.snapshot_growth),
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

/// Registers the tensors of `params`, and returns the registry with the place of each: the number of its CUDA device,
/// none for the host.
pub(super) fn register(
    params: &(impl Parameters + ?Sized),
    build: impl Fn(&[TensorView<'_>]) -> Result<TensorRegistry>,
) -> Result<(TensorRegistry, Vec<Option<usize>>)> {
    let mut registry = TensorRegistry::default();
    let mut places = Vec::new();
    params.with_tensors(&mut |views| {
        registry = build(views)?;
        places = engine::places(registry.order_views(views)?.all());
        Ok(())
    })?;
    Ok((registry, places))
}
