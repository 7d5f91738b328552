//! `Tracker`: the running averages of a model that trains.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use posthoc_ema::{
    Dtype, OnNonFinite, Options, Parameters, PostHocEma, Precision, Profile, Result, Retention, SavedState,
    ShardManifest, ShardRole, SwapGuard, TensorView, UpdateOutcome, agree as agree_on_roles,
};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use serde::Deserialize;

use crate::dtypes::describe;
use crate::errors::{argument, to_python};
use crate::graphs;
use crate::jobs;
use crate::json::{from_json, to_json};
use crate::lend::{Layout, Lent, Streams, output_views};
use crate::plans::{parse_profile, parse_profiles};
use crate::process;
use crate::saved_weights::SavedWeights;

/// Options of a run. An absent option keeps its default; on a resume it keeps the run's own value.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    profiles: Vec<Profile>,
    update_every: Option<u64>,
    update_after_step: Option<u64>,
    checkpoint_every: Option<u64>,
    /// 0 for no early snapshots.
    snapshot_growth: Option<f64>,
    max_checkpoints: Option<usize>,
    retention: Option<Retention>,
    /// `null` selects the model's dtypes; an absent option keeps the run's own.
    #[serde(with = "nullable")]
    checkpoint_dtype: Option<Option<Dtype>>,
    checkpoint_in_background: Option<bool>,
    on_nonfinite: Option<String>,
    compensated: Option<bool>,
    extend: Option<bool>,
    shard_size: Option<u64>,
    average: Option<Vec<String>>,
    copy: Option<Vec<String>>,
    leave_out: Option<Vec<String>>,
    device: Option<String>,
    device_copy: Option<bool>,
    /// Role of this process in a sharded run.
    role: Option<ShardRole>,
}

/// Deserializer that distinguishes `null` from an absent field.
mod nullable {
    use serde::{Deserialize, Deserializer};

    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
        T::deserialize(from).map(Some)
    }
}

impl Settings {
    fn into_options(self, directory: &str) -> PyResult<Options> {
        let mut options = PostHocEma::options(directory).profiles(self.profiles);
        macro_rules! set_given {
            ($($name:ident),*) => { $(if let Some(value) = self.$name { options = options.$name(value); })* };
        }
        set_given!(
            update_every,
            update_after_step,
            checkpoint_every,
            snapshot_growth,
            max_checkpoints,
            retention,
            checkpoint_dtype,
            checkpoint_in_background,
            shard_size,
            device_copy,
            extend
        );
        set_given!(average, copy, leave_out);
        if let Some(reaction) = self.on_nonfinite {
            options = options.on_non_finite(match reaction.as_str() {
                "raise" => OnNonFinite::Raise,
                "skip" => OnNonFinite::Skip,
                "ignore" => OnNonFinite::Ignore,
                _ => return Err(argument(format_args!("on_nonfinite = {reaction:?}"))),
            });
        }
        if let Some(compensated) = self.compensated {
            options = options.precision(if compensated { Precision::Compensated } else { Precision::Plain });
        }
        if let Some(role) = self.role {
            options = options.role(role);
        }
        match self.device {
            Some(device) => Ok(options.device(device.parse().map_err(argument)?)),
            None => Ok(options),
        }
    }
}

/// Running averages of lent tensors, stored in a run's directory; `None` once it is closed.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct Tracker {
    ema: Mutex<Option<PostHocEma>>,
    /// Fence of the newest update. Outside of `ema`, which another thread locks for a whole synthesis.
    #[cfg(feature = "cuda")]
    fence: Mutex<Option<posthoc_ema::compute::cuda::Fence>>,
}

impl Tracker {
    /// Calls `act` with the tracker, without the interpreter's lock.
    fn with<R: Send>(&self, py: Python<'_>, act: impl FnOnce(&mut PostHocEma) -> Result<R> + Send) -> PyResult<R> {
        process::check()?;
        py.detach(|| with_open(&mut self.lock(), act))
    }

    /// Updates the averages and keeps the fence, also if the call fails: a copy may run nevertheless.
    fn fold(
        &self,
        py: Python<'_>,
        update: impl FnOnce(&mut PostHocEma) -> Result<UpdateOutcome> + Send,
    ) -> PyResult<u8> {
        let outcome = self.with(py, |tracker| {
            let outcome = update(tracker);
            #[cfg(feature = "cuda")]
            self.lock_fence().clone_from(&tracker.fence().cloned());
            outcome
        });
        outcome.map(code)
    }

    #[cfg(feature = "cuda")]
    fn lock_fence(&self) -> MutexGuard<'_, Option<posthoc_ema::compute::cuda::Fence>> {
        self.fence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the tracker. After a panic in another thread it stays usable, as after an error.
    fn lock(&self) -> MutexGuard<'_, Option<PostHocEma>> {
        self.ema.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The package stores the live state, or warns of it, before the tracker is dropped.
impl Drop for Tracker {
    fn drop(&mut self) {
        if let Some(tracker) = self.lock().take() {
            tracker.abandon();
        }
    }
}

/// Calls `act` with the tracker.
///
/// # Errors
/// If the run was closed.
fn with_open<R>(tracker: &mut Option<PostHocEma>, act: impl FnOnce(&mut PostHocEma) -> Result<R>) -> PyResult<R> {
    act(opened(tracker)?).map_err(to_python)
}

/// Returns the tracker.
///
/// # Errors
/// If the run was closed.
fn opened(tracker: &mut Option<PostHocEma>) -> PyResult<&mut PostHocEma> {
    let closed = || PyRuntimeError::new_err("the run was closed: open it again with `resume=True` to continue");
    tracker.as_mut().ok_or_else(closed)
}

#[pymethods]
impl Tracker {
    /// Opens a run: `mode` is "create", "resume" or "either". With `state`, goes on from that live state.
    #[staticmethod]
    #[pyo3(signature = (directory, mode, options, layout, addresses, streams, state=None))]
    #[expect(clippy::too_many_arguments, reason = "one argument for each of the caller's")]
    fn open(
        py: Python<'_>,
        directory: &str,
        mode: &str,
        options: &str,
        layout: &Layout,
        addresses: Vec<u64>,
        streams: Streams,
        state: Option<PathBuf>,
    ) -> PyResult<Tracker> {
        process::check()?;
        let settings: Settings = from_json(options)?;
        let options = settings.into_options(directory)?;
        let lent = Lent::new(layout, addresses, streams)?;
        let opened = py.detach(|| match (mode, state) {
            (_, Some(state)) => options.resume_from(state, &lent),
            ("create", None) => options.create(&lent),
            ("resume", None) => options.resume(&lent),
            _ => options.resume_or_create(&lent),
        });
        opened
            .map(|tracker| Tracker {
                ema: Mutex::new(Some(tracker)),
                #[cfg(feature = "cuda")]
                fence: Mutex::default(),
            })
            .map_err(to_python)
    }

    /// Counts a step at which nothing is due and returns true; does nothing and returns false if something is due.
    fn skip(&self, py: Python<'_>) -> PyResult<bool> {
        // Another thread holds the lock for a whole update or synthesis.
        match self.ema.try_lock() {
            Ok(mut tracker) => with_open(&mut tracker, skip),
            Err(_) => self.with(py, skip),
        }
    }

    /// Counts a step and does the work that is due. Returns 0 for none, 1 for an update, 2 for a snapshot, too.
    ///
    /// `fenced` is true for the tensors that do not change before `wait_for_copy`, and stay allocated until then.
    #[pyo3(signature = (layout, addresses, streams, fenced=Vec::new()))]
    fn update(
        &self,
        py: Python<'_>,
        layout: &Layout,
        addresses: Vec<u64>,
        streams: Streams,
        fenced: Vec<bool>,
    ) -> PyResult<u8> {
        let lent = Lent::new(layout, addresses, streams)?.until_fence(fenced);
        self.fold(py, |tracker| tracker.update(&lent))
    }

    /// Same as `update`, on the caller's clock.
    fn update_at(
        &self,
        py: Python<'_>,
        time: u64,
        layout: &Layout,
        addresses: Vec<u64>,
        streams: Streams,
    ) -> PyResult<u8> {
        let lent = Lent::new(layout, addresses, streams)?;
        self.fold(py, |tracker| tracker.update_at(time, &lent))
    }

    /// Makes the stream of each device wait until the tensors of the newest update have been read.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only devices have streams"))]
    fn wait_for_copy(&self, py: Python<'_>, streams: Streams) -> PyResult<()> {
        #[cfg(feature = "cuda")]
        if let Some(fence) = self.lock_fence().clone() {
            return py.detach(|| crate::lend::wait_on_streams(&fence, &streams)).map_err(to_python);
        }
        Ok(())
    }

    /// True if lending tensors until the fence spares the training a wait.
    #[getter]
    fn needs_fence(&self, py: Python<'_>) -> PyResult<bool> {
        #[cfg(feature = "cuda")]
        return self.with(py, |tracker| Ok(tracker.needs_fence()));
        #[cfg(not(feature = "cuda"))]
        self.with(py, |_| Ok(false))
    }

    /// Returns in words where the averages are, and how the tensors come there.
    #[getter]
    fn placement(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |tracker| Ok(tracker.placement()))
    }

    /// Adds an update to the CUDA graph that the stream of the tensors is captured into.
    fn capture_update(&self, py: Python<'_>, layout: &Layout, addresses: Vec<u64>, streams: Streams) -> PyResult<()> {
        let lent = Lent::new(layout, addresses, streams.clone())?;
        process::check()?;
        py.detach(|| graphs::capture(opened(&mut self.lock())?, &lent, &streams))
    }

    /// Counts a step and calls `launch`, which replays a CUDA graph on a stream. Returns the same as `update`.
    #[pyo3(signature = (streams, launch, time=None))]
    fn replay(&self, py: Python<'_>, streams: Streams, launch: Py<PyAny>, time: Option<u64>) -> PyResult<u8> {
        process::check()?;
        py.detach(|| graphs::replay(opened(&mut self.lock())?, &streams, &launch, time)).map(code)
    }

    /// Stores the live state, in the run or at a path.
    #[pyo3(signature = (path=None))]
    fn save(&self, py: Python<'_>, path: Option<PathBuf>) -> PyResult<()> {
        self.with(py, |tracker| path.map_or_else(|| tracker.save(), |path| tracker.save_to(path)))
    }

    /// Waits until every snapshot so far is on disk.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |tracker| tracker.flush())
    }

    /// Stores a snapshot of the newest update, unless there is one, and the live state.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, PostHocEma::finish)
    }

    /// Returns true if the live state on disk is that of now.
    fn is_saved(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |tracker| Ok(tracker.is_saved()))
    }

    /// Releases the run after all pending writes.
    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            if let Some(tracker) = self.lock().take() {
                tracker.abandon();
            }
        });
    }

    /// Time of the last call.
    #[getter]
    fn step(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |tracker| Ok(tracker.step()))
    }

    /// Time of the newest update.
    #[getter]
    fn last_update(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        self.with(py, |tracker| Ok(tracker.history().last()))
    }

    /// True if the next call reads the tensors.
    #[getter]
    fn due(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |tracker| Ok(tracker.is_due()))
    }

    /// Returns the schedule, as JSON.
    fn schedule(&self, py: Python<'_>) -> PyResult<String> {
        to_json(&self.with(py, |tracker| Ok(tracker.schedule()))?)
    }

    /// Returns the tracked profiles, as JSON.
    fn profiles(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let profiles = self.with(py, |tracker| Ok(tracker.profiles().to_vec()))?;
        profiles.iter().map(to_json).collect()
    }

    /// Returns name, dtype and shape of the tensors of a synthesis.
    fn tensors(&self, py: Python<'_>) -> PyResult<Vec<(String, String, Vec<usize>)>> {
        self.with(py, |tracker| Ok(tracker.tensors())).map(describe)
    }

    /// Returns the names of the averaged tensors.
    fn averaged(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.with(py, |tracker| Ok(tracker.averaged()))
    }

    /// Returns the names that share another tensor's elements, with the name of that tensor.
    fn tied(&self, py: Python<'_>) -> PyResult<BTreeMap<String, String>> {
        self.with(py, |tracker| Ok(tracker.tied().clone()))
    }

    /// Solves targets at the newest update.
    fn plans(&self, py: Python<'_>, targets: Vec<String>) -> PyResult<String> {
        let targets = parse_profiles(&targets)?;
        to_json(&self.with(py, |tracker| tracker.plans(&targets))?)
    }

    /// Logs the warnings of targets at the newest update, as a synthesis does.
    fn log_warnings(&self, py: Python<'_>, targets: Vec<String>) -> PyResult<()> {
        let targets = parse_profiles(&targets)?;
        self.with(py, |tracker| tracker.log_warnings(&targets))
    }

    /// Blends targets at the newest update into new tensors, one list of addresses for each target.
    fn load_into(
        &self,
        py: Python<'_>,
        targets: Vec<String>,
        layout: &Layout,
        addresses: Vec<Vec<u64>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<String> {
        let targets = parse_profiles(&targets)?;
        let views = output_views(layout, addresses)?;
        let load = move |progress: jobs::Progress<'_>| {
            with_open(&mut self.lock(), |tracker| tracker.load_into(&targets, views, progress))
        };
        to_json(&jobs::run(py, progress, load)?)
    }

    /// Copies the running average of one profile into new tensors.
    fn load_tracked_into(&self, py: Python<'_>, index: usize, layout: &Layout, addresses: Vec<u64>) -> PyResult<()> {
        let views = output_views(layout, vec![addresses])?.remove(0);
        self.with(py, |tracker| tracker.load_tracked_into(index, views))
    }

    /// Writes an average into the lent tensors, and keeps their old elements in `originals`.
    fn swap_in(
        &self,
        py: Python<'_>,
        target: &str,
        originals: &SavedWeights,
        layout: &Layout,
        addresses: Vec<u64>,
        streams: Streams,
    ) -> PyResult<()> {
        let target = parse_profile(target)?;
        let mut lent = Lent::new(layout, addresses, streams)?;
        self.with(py, |tracker| {
            originals.fill(|| tracker.swap_in(target, &mut lent).map(SwapGuard::into_saved_weights))
        })
    }

    /// Replaces the elements of the lent tensors by an average.
    fn switch_to(
        &self,
        py: Python<'_>,
        target: &str,
        layout: &Layout,
        addresses: Vec<u64>,
        streams: Streams,
    ) -> PyResult<()> {
        let target = parse_profile(target)?;
        let mut lent = Lent::new(layout, addresses, streams)?;
        self.with(py, |tracker| tracker.switch_to(target, &mut lent))
    }
}

/// Empty list of tensors, for a step that reads none.
struct NoTensors;

impl Parameters for NoTensors {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        read(&[])
    }
}

fn skip(tracker: &mut PostHocEma) -> Result<bool> {
    if tracker.is_due() {
        return Ok(false);
    }
    tracker.update(&NoTensors).map(|_| true)
}

fn code(outcome: UpdateOutcome) -> u8 {
    match outcome {
        UpdateOutcome::Skipped => 0,
        UpdateOutcome::Updated => 1,
        UpdateOutcome::Stored => 2,
    }
}

/// Describes what this process would track, for `agree`, as JSON.
#[pyfunction]
pub fn shard_manifest(
    py: Python<'_>,
    process: usize,
    directory: &str,
    options: &str,
    layout: &Layout,
    addresses: Vec<u64>,
    streams: Streams,
) -> PyResult<String> {
    let settings: Settings = from_json(options)?;
    let options = settings.into_options(directory)?;
    let lent = Lent::new(layout, addresses, streams)?;
    py.detach(|| options.manifest(process, &lent)).map(|manifest| manifest.to_json()).map_err(to_python)
}

/// Returns the role of each process by the manifests of all, as JSON.
#[pyfunction]
pub fn agree(manifests: Vec<String>) -> PyResult<Vec<String>> {
    let manifests: Result<Vec<_>> = manifests.iter().map(|text| ShardManifest::from_json(text)).collect();
    let roles = manifests.and_then(|manifests| agree_on_roles(&manifests)).map_err(to_python)?;
    Ok(roles.iter().map(ShardRole::to_json).collect())
}

/// Returns the step of a live state that was saved to a path.
#[pyfunction]
pub fn state_step(path: PathBuf) -> PyResult<u64> {
    SavedState::at(path).map(|state| state.step).map_err(to_python)
}

/// Returns the step that a resume continues from; None without a live state.
#[pyfunction]
pub fn saved_step(directory: PathBuf) -> PyResult<Option<u64>> {
    PostHocEma::saved_step(directory).map_err(to_python)
}
