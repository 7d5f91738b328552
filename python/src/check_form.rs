//! Check that averages of a run or of checkpoints fit a form.

use pyo3::prelude::*;

use crate::average::Checkpoints;
use crate::errors::to_python;
use crate::form::OutputForm;
use crate::run::Run;

/// Source of averages.
#[derive(FromPyObject)]
pub enum FormSource<'py> {
    /// Run.
    Run(Bound<'py, Run>),
    /// Checkpoints.
    Checkpoints(Bound<'py, Checkpoints>),
}

/// Checks that targets of a source fit a form, and returns notes on it.
#[pyfunction]
#[pyo3(signature = (source, targets, step, form))]
pub fn check_form(
    py: Python<'_>,
    source: FormSource<'_>,
    targets: Vec<String>,
    step: Option<u64>,
    form: &OutputForm,
) -> PyResult<Vec<String>> {
    let notes = match &source {
        FormSource::Run(run) => {
            let (run, plans) = (run.get(), run.get().solve(py, &targets, step, "off")?);
            py.detach(|| run.0.check_form(&plans, &form.0))
        }
        FormSource::Checkpoints(checkpoints) => {
            let (checkpoints, merges) = (checkpoints.get(), checkpoints.get().merges(py, &targets, step)?);
            py.detach(|| checkpoints.0.check_form(&merges, &form.0))
        }
    };
    notes.map_err(to_python)
}
