//! `Tracker`: the running averages of a training.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use posthoc_ema::{
    Dtype, Options, Parameters, PostHocEma, Precision, Profile, Result, Retention, SwapGuard, TensorSpec, TensorView,
    UpdateOutcome,
};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use serde::Deserialize;

use crate::errors::{argument, to_python};
use crate::jobs;
use crate::lend::{Layout, Lent, dtype_name, parse_dtype};
use crate::plans::{plans_json, profile, profiles};
use crate::process;

/// Options of a run; what is absent keeps its default, on a resume what the run has.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    profiles: Vec<Profile>,
    update_every: Option<u64>,
    update_after_step: Option<u64>,
    checkpoint_every: Option<u64>,
    max_checkpoints: Option<usize>,
    retention: Option<Retention>,
    /// `null` stands for the model's dtypes; an absent one for what the run has.
    #[serde(with = "serde_some")]
    checkpoint_dtype: Option<Option<Dtype>>,
    checkpoint_in_background: Option<bool>,
    compensated: Option<bool>,
    shard_size: Option<u64>,
    average: Option<Vec<String>>,
    copy: Option<Vec<String>>,
    leave_out: Option<Vec<String>>,
    device: Option<String>,
}

/// Tells `null` from what is absent.
mod serde_some {
    use serde::{Deserialize, Deserializer};

    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
        T::deserialize(from).map(Some)
    }
}

impl Settings {
    fn options(self, directory: &str) -> PyResult<Options> {
        let mut options = PostHocEma::options(directory).profiles(self.profiles);
        macro_rules! set {
            ($($name:ident),*) => { $(if let Some(value) = self.$name { options = options.$name(value); })* };
        }
        set!(
            update_every,
            update_after_step,
            checkpoint_every,
            max_checkpoints,
            retention,
            checkpoint_dtype,
            checkpoint_in_background,
            shard_size
        );
        set!(average, copy, leave_out);
        if let Some(compensated) = self.compensated {
            options = options.precision(if compensated { Precision::Compensated } else { Precision::Plain });
        }
        match self.device {
            Some(device) => Ok(options.device(device.parse().map_err(argument)?)),
            None => Ok(options),
        }
    }
}

/// Running averages of lent tensors, stored in a run's directory; none once it is closed.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct Tracker(Mutex<Option<PostHocEma>>);

impl Tracker {
    /// Does something with the tracker, without the interpreter's lock.
    fn with<R: Send>(&self, py: Python<'_>, act: impl FnOnce(&mut PostHocEma) -> Result<R> + Send) -> PyResult<R> {
        process::check()?;
        py.detach(|| with(&mut self.lock(), act))
    }

    /// The tracker; a panic in another thread leaves it usable, as an error would.
    fn lock(&self) -> MutexGuard<'_, Option<PostHocEma>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn with<R>(tracker: &mut Option<PostHocEma>, act: impl FnOnce(&mut PostHocEma) -> Result<R>) -> PyResult<R> {
    match tracker {
        Some(tracker) => act(tracker).map_err(to_python),
        None => Err(PyRuntimeError::new_err("the run was closed: open it anew with `resume=True` to go on")),
    }
}

#[pymethods]
impl Tracker {
    /// Opens a run: `mode` is "create", "resume" or "either".
    #[staticmethod]
    fn open(
        py: Python<'_>,
        directory: &str,
        mode: &str,
        options: &str,
        layout: &Layout,
        addresses: Vec<u64>,
        stream: usize,
    ) -> PyResult<Tracker> {
        process::check()?;
        let settings: Settings = serde_json::from_str(options).map_err(argument)?;
        let options = settings.options(directory)?;
        let lent = Lent::new(layout, addresses, stream)?;
        let opened = py.detach(|| match mode {
            "create" => options.create(&lent),
            "resume" => options.resume(&lent),
            _ => options.resume_or_create(&lent),
        });
        opened.map(|tracker| Tracker(Mutex::new(Some(tracker)))).map_err(to_python)
    }

    /// Counts a step where nothing is due, and returns true; otherwise does nothing.
    fn skip(&self, py: Python<'_>) -> PyResult<bool> {
        // Held by another thread for the length of what it does: an update, or a synthesis.
        match self.0.try_lock() {
            Ok(mut tracker) => with(&mut tracker, skip),
            Err(_) => self.with(py, skip),
        }
    }

    /// Counts a step and does what is due: 0 nothing, 1 an update, 2 a snapshot too.
    fn update(&self, py: Python<'_>, layout: &Layout, addresses: Vec<u64>, stream: usize) -> PyResult<u8> {
        let lent = Lent::new(layout, addresses, stream)?;
        self.with(py, |tracker| tracker.update(&lent)).map(code)
    }

    /// As `update`, on the caller's clock.
    fn update_at(
        &self,
        py: Python<'_>,
        time: u64,
        layout: &Layout,
        addresses: Vec<u64>,
        stream: usize,
    ) -> PyResult<u8> {
        let lent = Lent::new(layout, addresses, stream)?;
        self.with(py, |tracker| tracker.update_at(time, &lent)).map(code)
    }

    /// Stores the live state.
    fn save(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |tracker| tracker.save())
    }

    /// Waits until every snapshot so far is on disk.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |tracker| tracker.flush())
    }

    /// Ends the run.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, PostHocEma::finish)
    }

    /// Gives the run free, when what is being stored is stored.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }

    /// The time of the last call.
    #[getter]
    fn step(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |tracker| Ok(tracker.step()))
    }

    /// The time of the newest update.
    #[getter]
    fn last_update(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        self.with(py, |tracker| Ok(tracker.history().last()))
    }

    /// The tracked profiles, as JSON.
    fn profiles(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let profiles = self.with(py, |tracker| Ok(tracker.profiles().to_vec()))?;
        profiles.iter().map(|profile| serde_json::to_string(profile).map_err(argument)).collect()
    }

    /// Name, dtype and shape of the tensors of a synthesis.
    fn tensors(&self, py: Python<'_>) -> PyResult<Vec<(String, String, Vec<usize>)>> {
        self.with(py, |tracker| Ok(tracker.tensors())).map(describe)
    }

    /// The names of those that are averaged.
    fn averaged(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.with(py, |tracker| Ok(tracker.averaged()))
    }

    /// The names that share another tensor's elements, and that other's name.
    fn tied(&self, py: Python<'_>) -> PyResult<BTreeMap<String, String>> {
        self.with(py, |tracker| Ok(tracker.tied().clone()))
    }

    /// Solves targets at the newest update.
    fn plans(&self, py: Python<'_>, targets: Vec<String>) -> PyResult<String> {
        let targets = profiles(&targets)?;
        plans_json(&self.with(py, |tracker| tracker.plans(&targets))?)
    }

    /// Blends targets at the newest update into fresh memory, one list of addresses for each.
    fn load_into(
        &self,
        py: Python<'_>,
        targets: Vec<String>,
        layout: &Layout,
        addresses: Vec<Vec<u64>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<String> {
        let targets = profiles(&targets)?;
        let mut lent = addresses.into_iter().map(|list| Lent::new(layout, list, 0)).collect::<PyResult<Vec<_>>>()?;
        let views = Lent::fresh(&mut lent)?;
        let load = move |progress: jobs::Progress<'_>| {
            with(&mut self.lock(), |tracker| tracker.load_into(&targets, views, progress))
        };
        plans_json(&jobs::run(py, progress, load)?)
    }

    /// The running average of one profile, into fresh memory.
    fn load_tracked_into(&self, py: Python<'_>, index: usize, layout: &Layout, addresses: Vec<u64>) -> PyResult<()> {
        let views = Lent::fresh(&mut [Lent::new(layout, addresses, 0)?])?.remove(0);
        self.with(py, |tracker| tracker.load_tracked_into(index, views))
    }

    /// Puts an average into the lent tensors, and what they held into `originals`.
    fn swap_in(
        &self,
        py: Python<'_>,
        target: &str,
        originals: &SavedWeights,
        layout: &Layout,
        addresses: Vec<u64>,
        stream: usize,
    ) -> PyResult<()> {
        let (target, mut lent) = (profile(target)?, Lent::new(layout, addresses, stream)?);
        self.with(py, |tracker| originals.fill(|| tracker.swap_in(target, &mut lent).map(SwapGuard::into_originals)))
    }

    /// Puts an average into the lent tensors for good.
    fn switch_to(
        &self,
        py: Python<'_>,
        target: &str,
        layout: &Layout,
        addresses: Vec<u64>,
        stream: usize,
    ) -> PyResult<()> {
        let (target, mut lent) = (profile(target)?, Lent::new(layout, addresses, stream)?);
        self.with(py, |tracker| tracker.switch_to(target, &mut lent))
    }
}

/// Nothing, for a step at which nothing is read.
struct Nothing;

impl Parameters for Nothing {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        read(&[])
    }
}

fn skip(tracker: &mut PostHocEma) -> Result<bool> {
    if tracker.is_due() {
        return Ok(false);
    }
    tracker.update(&Nothing).map(|_| true)
}

fn code(step: UpdateOutcome) -> u8 {
    match step {
        UpdateOutcome::Skipped => 0,
        UpdateOutcome::Updated => 1,
        UpdateOutcome::Stored => 2,
    }
}

pub fn describe(tensors: Vec<TensorSpec>) -> Vec<(String, String, Vec<usize>)> {
    tensors.into_iter().map(|tensor| (tensor.name, dtype_name(tensor.dtype), tensor.shape)).collect()
}

/// What lent tensors held before an average was put in their place; nothing before that.
///
/// It is there before the average is put in, so that no exception between the two, Ctrl-C for one, can lose it.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct SavedWeights(Mutex<Option<posthoc_ema::SavedWeights>>);

impl SavedWeights {
    /// Keeps what `swap` returns.
    pub fn fill(&self, swap: impl FnOnce() -> Result<posthoc_ema::SavedWeights>) -> Result<()> {
        *self.lock() = Some(swap()?);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<posthoc_ema::SavedWeights>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl SavedWeights {
    #[new]
    fn new() -> SavedWeights {
        SavedWeights(Mutex::new(None))
    }

    /// Whether an average was put in.
    #[getter]
    fn filled(&self) -> bool {
        self.lock().is_some()
    }

    /// Gives every tensor its own bits back; may be called again.
    fn restore(&self, py: Python<'_>, layout: &Layout, addresses: Vec<u64>, stream: usize) -> PyResult<()> {
        let mut lent = Lent::new(layout, addresses, stream)?;
        py.detach(|| self.lock().as_ref().map_or(Ok(()), |originals| originals.restore(&mut lent))).map_err(to_python)
    }
}

/// The step from which a resume would go on; none without a live state.
#[pyfunction]
pub fn saved_step(directory: PathBuf) -> PyResult<Option<u64>> {
    PostHocEma::saved_step(directory).map_err(to_python)
}

/// A dtype, where there is one.
pub fn some_dtype(name: Option<&str>) -> PyResult<Option<Dtype>> {
    name.map(parse_dtype).transpose()
}
