//! `SavedWeights`: the elements of a model while it holds an average.

use std::sync::{Mutex, MutexGuard, PoisonError};

use posthoc_ema::Result;
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::lend::{Layout, Lent, Streams};

/// Elements of lent tensors before an average replaced them; empty until then.
///
/// The object is made before the average is written, so that no exception in between, such as Ctrl-C, loses them.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct SavedWeights(Mutex<Option<posthoc_ema::SavedWeights>>);

impl SavedWeights {
    /// Keeps the elements that `swap` returns.
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

    /// True once the elements are saved, and an average may have replaced them.
    #[getter]
    fn filled(&self) -> bool {
        self.lock().is_some()
    }

    /// Copies the elements, which the caller replaces.
    fn save(&self, py: Python<'_>, layout: &Layout, addresses: Vec<u64>, streams: Streams) -> PyResult<()> {
        let lent = Lent::new(layout, addresses, streams)?;
        py.detach(|| self.fill(|| posthoc_ema::SavedWeights::copy_of(&lent))).map_err(to_python)
    }

    /// Restores every tensor's own bits; may be called again.
    fn restore(&self, py: Python<'_>, layout: &Layout, addresses: Vec<u64>, streams: Streams) -> PyResult<()> {
        let mut lent = Lent::new(layout, addresses, streams)?;
        py.detach(|| self.lock().as_ref().map_or(Ok(()), |saved| saved.restore(&mut lent))).map_err(to_python)
    }
}
