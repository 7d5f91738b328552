//! `Checkpoints`: files of a training in which nothing was tracked.

use std::path::{Path, PathBuf};

use posthoc_ema::{AdapterProduct, CheckpointOptions, Device, Merge, OutputPart, WriteOptions};
use pyo3::prelude::*;

use crate::dtypes::{describe, parse_optional_dtype};
use crate::errors::{argument, to_python};
use crate::form::OutputForm;
use crate::jobs;
use crate::json::to_json;
use crate::lend::{Layout, output_views};
use crate::plans::{at, parse_profiles};
use crate::process;

/// Checkpoints of one model, opened and checked against each other.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct Checkpoints(pub posthoc_ema::Checkpoints);

impl Checkpoints {
    /// Weighs the checkpoints for targets.
    pub fn merges(&self, py: Python<'_>, targets: &[String], step: Option<u64>) -> PyResult<Vec<Merge>> {
        process::check()?;
        let targets = parse_profiles(targets)?;
        py.detach(|| self.0.plans(&targets, at(step))).map_err(to_python)
    }
}

#[pymethods]
impl Checkpoints {
    /// Opens and checks checkpoints. The options are those of the library.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "called by name, by the package only")]
    fn new(
        py: Python<'_>,
        paths: Vec<PathBuf>,
        steps: Option<Vec<u64>>,
        key: Option<String>,
        copy: Vec<String>,
        leave_out: Vec<String>,
        other_names: Vec<String>,
        ignore_config: Vec<String>,
        product: &str,
        follow_links: bool,
    ) -> PyResult<Checkpoints> {
        process::check()?;
        let product = match product {
            "factors" => AdapterProduct::Factors,
            "svd" => AdapterProduct::Svd,
            other => return Err(argument(format!("product: {other:?} is not one of \"factors\" and \"svd\""))),
        };
        let options = CheckpointOptions { steps, key, copy, leave_out, other_names, ignore_config, product };
        let opened = py.detach(|| posthoc_ema::Checkpoints::open_with(&paths, &options)).map_err(to_python)?;
        Ok(Checkpoints(opened.follow_links(follow_links)))
    }

    /// Returns notes on how the checkpoints were read.
    fn notes(&self) -> Vec<String> {
        self.0.notes().to_vec()
    }

    /// Returns name, dtype and shape of the tensors of an average.
    fn tensors(&self) -> Vec<(String, String, Vec<usize>)> {
        describe(self.0.tensors())
    }

    /// Returns the names of the averaged tensors.
    fn averaged(&self) -> Vec<String> {
        self.0.averaged()
    }

    /// Returns the plans of targets as JSON, and each plan's warning, if there is one.
    fn plans(
        &self,
        py: Python<'_>,
        targets: Vec<String>,
        step: Option<u64>,
    ) -> PyResult<(String, Vec<Option<String>>)> {
        let merges = self.merges(py, &targets, step)?;
        Ok((to_json(&merges)?, merges.iter().map(Merge::warning).collect()))
    }

    /// Returns the errors of averages of products of adapters as JSON: null for each target if factors are averaged.
    fn product_errors(&self, py: Python<'_>, targets: Vec<String>, step: Option<u64>) -> PyResult<String> {
        let merges = self.merges(py, &targets, step)?;
        let errors = || merges.iter().map(|merge| self.0.product_errors(merge)).collect::<Result<Vec<_>, _>>();
        to_json(&py.detach(errors).map_err(to_python)?)
    }

    /// Returns the bytes of checkpoints that are read for targets.
    fn bytes_to_read(&self, py: Python<'_>, targets: Vec<String>, step: Option<u64>) -> PyResult<u64> {
        Ok(self.0.bytes_to_read(&self.merges(py, &targets, step)?))
    }

    /// Blends targets in one pass into new tensors, one list of addresses for each target.
    fn load_into(
        &self,
        py: Python<'_>,
        targets: Vec<String>,
        step: Option<u64>,
        layout: &Layout,
        addresses: Vec<Vec<u64>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let merges = self.merges(py, &targets, step)?;
        let views = output_views(layout, addresses)?;
        jobs::run(py, progress, |progress| self.0.load_into(&merges, views, progress).map_err(to_python))
    }

    /// Writes each target to a file or folder, or a part `K/N` of it, in one pass.
    #[expect(clippy::too_many_arguments, reason = "called by name, by the package only")]
    fn write(
        &self,
        py: Python<'_>,
        targets: Vec<String>,
        step: Option<u64>,
        paths: Vec<PathBuf>,
        dtype: Option<&str>,
        device: &str,
        form: &OutputForm,
        part: Option<&str>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let merges = self.merges(py, &targets, step)?;
        if merges.len() != paths.len() {
            return Err(argument(format!("{} paths for {} targets", paths.len(), merges.len())));
        }
        let outputs: Vec<(&Merge, &Path)> = merges.iter().zip(paths.iter().map(PathBuf::as_path)).collect();
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
        jobs::run(py, progress, write)
    }
}
