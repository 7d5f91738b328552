//! Pictures of the program, as PNG bytes.

use posthoc_ema_cli::{ErrorCurve, ErrorPoint, SweepCurve, SweepPoint, error_curve_png, sweep_png};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::argument;

/// Draws relative errors over sigma_rel, with tracked lengths and their names, on a PNG of `size` pixels.
#[pyfunction]
pub fn draw_errors<'py>(
    py: Python<'py>,
    errors: Vec<(f64, f64)>,
    tracked: Vec<(f64, String)>,
    title: String,
    size: (u32, u32),
) -> PyResult<Bound<'py, PyBytes>> {
    // Without the rounding of snapshots, the noise gain is not drawn.
    let points = errors
        .into_iter()
        .map(|(sigma_rel, relative_error)| ErrorPoint { sigma_rel, relative_error, noise_gain: 0.0 })
        .collect();
    let curve = ErrorCurve { title, points, tracked, rounding: None };
    let png = py.detach(|| error_curve_png(&curve, size)).map_err(argument)?;
    Ok(PyBytes::new(py, &png))
}

/// Draws scores over lengths, with the best one marked, on a PNG of `size` pixels.
///
/// A point is a length, its score unless the evaluation failed, and true for a step of the refinement.
#[pyfunction]
pub fn draw_scores<'py>(
    py: Python<'py>,
    points: Vec<(f64, Option<f64>, bool)>,
    best: Option<usize>,
    length_name: String,
    title: String,
    size: (u32, u32),
) -> PyResult<Bound<'py, PyBytes>> {
    let points =
        points.into_iter().map(|(x, score, refined)| SweepPoint { x, score, refined, as_good: false }).collect();
    let curve = SweepCurve { title, x_label: length_name, y_label: "score".into(), points, best, standard_error: None };
    let png = py.detach(|| sweep_png(&[curve], size)).map_err(argument)?;
    Ok(PyBytes::new(py, &png))
}
