//! Imports of other tools' checkpoints.

use std::path::PathBuf;

use posthoc_ema::{AverageDecay, EmaDecay, Import, ImportAverages, Ramp, Tool};
use pyo3::prelude::*;

use crate::errors::{argument, to_python};
use crate::jobs;
use crate::plans::parse_profiles;
use crate::process;

/// Number of snapshots, their steps, bytes written, and warnings of an import.
type Report = (usize, Vec<u64>, u64, Vec<String>);

/// Writes another tool's checkpoints as a run.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "called by name, by the package only")]
pub fn import_run(
    py: Python<'_>,
    source: PathBuf,
    run: PathBuf,
    tool: &str,
    tracked: Vec<String>,
    update_every: u64,
    update_after_step: Option<u64>,
    step_size_correction: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Report> {
    let tool: Tool = tool.parse().map_err(|why| argument(format!("cannot import from `{tool}`: {why}")))?;
    let mut import = Import::new(tool, parse_profiles(&tracked)?, update_every);
    import.update_after_step = update_after_step;
    import.step_size_correction = step_size_correction;
    let imported = jobs::run(py, progress, |progress| import.write(&source, &run, progress).map_err(to_python))?;
    Ok((imported.snapshots, imported.steps, imported.bytes, imported.warnings))
}

/// Averages that a training kept itself, found in a folder and checked.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct FoundAverages(posthoc_ema::FoundAverages);

#[pymethods]
impl FoundAverages {
    /// Finds averages. Decays are those of `betas`, then of the power functions `tracked`.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "called by name, by the package only")]
    fn new(
        py: Python<'_>,
        source: PathBuf,
        keys: Vec<String>,
        betas: Vec<f64>,
        ramp: Option<&str>,
        tracked: Vec<String>,
        raw: Option<String>,
        update_every: Option<u64>,
        update_after_step: Option<u64>,
        steps: Option<Vec<u64>>,
        copy: Vec<String>,
        leave_out: Vec<String>,
        ignore_config: Vec<String>,
    ) -> PyResult<FoundAverages> {
        process::check()?;
        let ramp: Option<Ramp> = ramp.map(|ramp| ramp.parse().map_err(argument)).transpose()?;
        if ramp.is_some() && betas.is_empty() {
            return Err(argument("`ramp` is the start of an EMA: give its decay as `beta`"));
        }
        let ramp = ramp.unwrap_or_default();
        let emas = betas.into_iter().map(|beta| AverageDecay::Ema(EmaDecay { beta, floor: 0.0, ramp }));
        let decays = emas.chain(parse_profiles(&tracked)?.into_iter().map(AverageDecay::Power)).collect();
        let import = ImportAverages {
            keys,
            decays,
            raw,
            update_every,
            update_after_step,
            steps,
            copy,
            leave_out,
            ignore_config,
        };
        let found = py.detach(|| import.open(&source)).map_err(to_python)?;
        Ok(FoundAverages(found))
    }

    /// Returns how the files were read.
    fn notes(&self) -> Vec<String> {
        self.0.notes().to_vec()
    }

    /// Returns the bytes that are written.
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Writes them as a run.
    fn write(&self, py: Python<'_>, run: PathBuf, progress: Option<&Bound<'_, PyAny>>) -> PyResult<Report> {
        let imported = jobs::run(py, progress, |progress| self.0.write(&run, progress).map_err(to_python))?;
        Ok((imported.snapshots, imported.steps, imported.bytes, imported.warnings))
    }
}
