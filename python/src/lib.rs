//! Native part of the Python package `posthoc_ema`: trackers, runs and plans over memory that is lent by address.
//!
//! It is private to the package. Only the Python modules know PyTorch and NumPy: here a tensor is a name, a dtype, a
//! shape, a device and an address. Profiles, options and plans are passed as JSON in the library's own format.

mod average;
mod check_form;
mod dtypes;
mod errors;
mod form;
mod graphs;
mod import;
mod jobs;
mod json;
mod lend;
mod pictures;
mod plans;
mod process;
mod program;
mod run;
mod saved_weights;
mod sweep;
mod tracker;
mod warnings;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    process::record();
    posthoc_ema::install_sigbus_handler();
    // Writes the library's warnings to standard error without the interpreter's lock.
    posthoc_ema_cli::log_to_stderr(warnings::keep);
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("CUDA", cfg!(feature = "cuda"))?;
    module.add_class::<lend::Layout>()?;
    module.add_class::<tracker::Tracker>()?;
    module.add_class::<saved_weights::SavedWeights>()?;
    module.add_class::<run::Run>()?;
    module.add_class::<sweep::Sweep>()?;
    module.add_class::<average::Checkpoints>()?;
    module.add_class::<form::OutputForm>()?;
    module.add_function(wrap_pyfunction!(plans::cuda_devices, module)?)?;
    module.add_function(wrap_pyfunction!(tracker::saved_step, module)?)?;
    module.add_function(wrap_pyfunction!(tracker::state_step, module)?)?;
    module.add_function(wrap_pyfunction!(tracker::shard_manifest, module)?)?;
    module.add_function(wrap_pyfunction!(tracker::agree, module)?)?;
    module.add_function(wrap_pyfunction!(plans::check_profile, module)?)?;
    module.add_function(wrap_pyfunction!(plans::track, module)?)?;
    module.add_function(wrap_pyfunction!(plans::as_sigma_rel, module)?)?;
    module.add_function(wrap_pyfunction!(plans::cumulative, module)?)?;
    module.add_function(wrap_pyfunction!(plans::forecast, module)?)?;
    module.add_function(wrap_pyfunction!(check_form::check_form, module)?)?;
    module.add_function(wrap_pyfunction!(plans::advise, module)?)?;
    module.add_function(wrap_pyfunction!(plans::advice_parts, module)?)?;
    module.add_function(wrap_pyfunction!(import::import_run, module)?)?;
    module.add_class::<import::FoundAverages>()?;
    module.add_function(wrap_pyfunction!(sweep::profile_length, module)?)?;
    module.add_function(wrap_pyfunction!(pictures::draw_errors, module)?)?;
    module.add_function(wrap_pyfunction!(pictures::draw_scores, module)?)?;
    module.add_function(wrap_pyfunction!(program::run_program, module)?)?;
    module.add_function(wrap_pyfunction!(warnings::take_warnings, module)?)?;
    Ok(())
}
