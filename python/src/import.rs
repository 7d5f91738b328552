//! Checkpoints of other tools.
use pyo3::prelude::*;

#[pyfunction]
pub fn import_run() -> PyResult<()> {
    Ok(())
}
