//! `OutputForm`: the form of averages on disk.

use std::path::PathBuf;

use posthoc_ema::FormOptions;
use pyo3::prelude::*;

use crate::errors::to_python;

/// Form of averages on disk.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct OutputForm(pub posthoc_ema::OutputForm);

#[pymethods]
impl OutputForm {
    /// Reads a form. The options are those of the library.
    #[new]
    fn new(
        py: Python<'_>,
        like: Option<PathBuf>,
        shard_size: Option<u64>,
        rename: Vec<String>,
        leave_out: Vec<String>,
        follow_links: bool,
    ) -> PyResult<OutputForm> {
        let options = FormOptions { like, shard_size, rename, leave_out, follow_links };
        py.detach(|| posthoc_ema::OutputForm::new(&options)).map(OutputForm).map_err(to_python)
    }

    /// Returns the names of the tensors of the folder that are left out.
    fn left_out(&self) -> Vec<String> {
        self.0.left_out().to_vec()
    }

    /// Returns true if averages are written as they are without a form.
    fn is_plain(&self) -> bool {
        self.0.recorded().is_none()
    }

    /// Returns true if an average becomes a folder.
    fn is_folder(&self) -> bool {
        self.0.is_folder()
    }
}
