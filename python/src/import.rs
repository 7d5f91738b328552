//! Imports of other tools' checkpoints.

use std::path::PathBuf;

use posthoc_ema::{Import, Tool};
use pyo3::prelude::*;

use crate::errors::{argument, to_python};
use crate::jobs;
use crate::plans::parse_profiles;

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
