//! `Run`: the stored snapshots of a training.

use std::collections::BTreeMap;
use std::path::PathBuf;

use posthoc_ema::{Device, Output, OutputPart, Plan, WriteOptions};
use pyo3::prelude::*;

use crate::dtypes::{describe, parse_optional_dtype};
use crate::errors::{argument, to_python};
use crate::form::OutputForm;
use crate::jobs;
use crate::json::to_json;
use crate::lend::{Layout, Lent, Streams, output_views};
use crate::plans::{at, parse_noise, parse_targets};
use crate::process;
use crate::saved_weights::SavedWeights;

/// Snapshots of a run, mapped into memory.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct Run(pub posthoc_ema::Run);

impl Run {
    /// Solves targets; `noise` is "off", "auto" or a number.
    pub fn solve(&self, py: Python<'_>, targets: &[String], step: Option<u64>, noise: &str) -> PyResult<Vec<Plan>> {
        process::check()?;
        let (targets, groups) = parse_targets(targets)?;
        let noise = parse_noise(noise)?;
        py.detach(|| self.0.grouped_plans(&targets, &groups, at(step), noise)).map_err(to_python)
    }
}

#[pymethods]
impl Run {
    /// Opens and checks all snapshots in a directory.
    #[new]
    fn new(py: Python<'_>, directory: PathBuf) -> PyResult<Run> {
        process::check()?;
        py.detach(|| posthoc_ema::Run::open(directory)).map(Run).map_err(to_python)
    }

    /// Reads every byte and opens the undamaged snapshots; returns the reason for each one that is left out.
    #[staticmethod]
    fn open_sound(py: Python<'_>, directory: PathBuf) -> PyResult<(Run, Vec<String>)> {
        process::check()?;
        let opened = py.detach(|| posthoc_ema::Run::open_sound(directory, &mut |_| ()));
        let (run, damaged) = opened.map_err(to_python)?;
        Ok((Run(run), damaged.iter().map(ToString::to_string).collect()))
    }

    /// Returns profile index and step of each snapshot.
    fn snapshots(&self) -> Vec<(usize, u64)> {
        self.0.snapshots().iter().map(|snapshot| (snapshot.id.index, snapshot.id.step)).collect()
    }

    /// Returns the tracked profiles by their index, as JSON.
    fn profiles(&self) -> PyResult<BTreeMap<usize, String>> {
        self.0.profiles().into_iter().map(|(index, profile)| Ok((index, to_json(profile)?))).collect()
    }

    /// Returns name, dtype and shape of the tensors of a synthesis at a step, or at the newest one.
    #[pyo3(signature = (step=None))]
    fn tensors(&self, step: Option<u64>) -> Vec<(String, String, Vec<usize>)> {
        describe(self.0.tensors_at(step.unwrap_or(u64::MAX)))
    }

    /// Returns the names of the averaged tensors.
    #[pyo3(signature = (step=None))]
    fn averaged(&self, step: Option<u64>) -> Vec<String> {
        self.0.averaged_at(step.unwrap_or(u64::MAX))
    }

    /// Returns the names that share another tensor's elements, with the name of that tensor.
    #[pyo3(signature = (step=None))]
    fn tied(&self, step: Option<u64>) -> BTreeMap<String, String> {
        self.0.tied_at(step.unwrap_or(u64::MAX)).clone()
    }

    /// Solves targets; `noise` is "off", "auto" or a number.
    fn plans(&self, py: Python<'_>, targets: Vec<String>, step: Option<u64>, noise: &str) -> PyResult<String> {
        to_json(&self.solve(py, &targets, step, noise)?)
    }

    /// Logs the warnings of targets, as a synthesis does.
    fn log_warnings(&self, py: Python<'_>, targets: Vec<String>, step: Option<u64>, noise: &str) -> PyResult<()> {
        posthoc_ema::log_warnings(self.0.dir(), &self.solve(py, &targets, step, noise)?);
        Ok(())
    }

    /// Returns the bytes of snapshots that a synthesis reads.
    fn bytes_to_read(&self, py: Python<'_>, targets: Vec<String>, step: Option<u64>) -> PyResult<u64> {
        // A regularisation sets no weight to 0, so the plans without one read the same files.
        Ok(self.0.bytes_to_read(&self.solve(py, &targets, step, "off")?))
    }

    /// Blends targets in one pass into new tensors, one list of addresses for each target.
    #[expect(clippy::too_many_arguments, reason = "called by the package only")]
    fn load_into(
        &self,
        py: Python<'_>,
        targets: Vec<String>,
        step: Option<u64>,
        noise: &str,
        layout: &Layout,
        addresses: Vec<Vec<u64>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<String> {
        let plans = self.solve(py, &targets, step, noise)?;
        let views = output_views(layout, addresses)?;
        jobs::run(py, progress, |progress| self.0.load_into(&plans, views, progress).map_err(to_python))?;
        to_json(&plans)
    }

    /// Writes each target to a file or folder, or a part `K/N` of it, in one pass; returns the plans.
    #[expect(clippy::too_many_arguments, reason = "called by name, by the package only")]
    fn write(
        &self,
        py: Python<'_>,
        targets: Vec<String>,
        step: Option<u64>,
        noise: &str,
        paths: Vec<PathBuf>,
        dtype: Option<&str>,
        device: &str,
        form: &OutputForm,
        part: Option<&str>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<String> {
        let plans = self.solve(py, &targets, step, noise)?;
        if plans.len() != paths.len() {
            return Err(argument(format!("{} paths for {} targets", paths.len(), plans.len())));
        }
        let outputs: Vec<Output<'_>> = plans.iter().zip(&paths).map(|(plan, path)| Output { plan, path }).collect();
        let dtype = parse_optional_dtype(dtype)?;
        let device: Device = device.parse().map_err(argument)?;
        let part: Option<OutputPart> = part.map(str::parse).transpose().map_err(to_python)?;
        let write = |progress: jobs::Progress<'_>| {
            let options = WriteOptions { dtype, device, progress };
            match part {
                Some(part) => self.0.write_part(&outputs, &form.0, &options, part).map(drop),
                None => self.0.write_as(&outputs, &form.0, &options).map(drop),
            }
            .map_err(to_python)
        };
        jobs::run(py, progress, write)?;
        to_json(&plans)
    }

    /// Writes an average into the lent tensors, and keeps their old elements in `originals`.
    #[expect(clippy::too_many_arguments, reason = "called by the package only")]
    fn swap_in(
        &self,
        py: Python<'_>,
        target: &str,
        step: Option<u64>,
        noise: &str,
        originals: &SavedWeights,
        layout: &Layout,
        addresses: Vec<u64>,
        streams: Streams,
    ) -> PyResult<()> {
        let plan = self.solve(py, &[target.to_owned()], step, noise)?.remove(0);
        let mut lent = Lent::new(layout, addresses, streams)?;
        let swap = || originals.fill(|| self.0.swap_in(&plan, &mut lent).map(|swapped| swapped.into_saved_weights()));
        py.detach(swap).map_err(to_python)
    }

    /// Returns the identity under which a sweep records the run.
    fn identity(&self) -> String {
        posthoc_ema::sweep::identity(&self.0)
    }

    /// Reads every byte of every snapshot and compares its checksum.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.verify(&mut |_| ())).map_err(to_python)
    }
}
