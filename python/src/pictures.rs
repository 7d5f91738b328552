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

/// Lengths with their scores: each a length, its score unless the evaluation failed, true for a step of the refinement,
/// and true if it is as good as the best. Then the index of the best, the names of the scores and of the lengths, and
/// the standard error.
type ScoreCurve = (Vec<(f64, Option<f64>, bool, bool)>, Option<usize>, String, String, Option<f64>);

/// Draws scores over lengths, with the best one marked, on a PNG of `size` pixels: a panel for each curve.
#[pyfunction]
pub fn draw_scores<'py>(
    py: Python<'py>,
    curves: Vec<ScoreCurve>,
    title: String,
    size: (u32, u32),
) -> PyResult<Bound<'py, PyBytes>> {
    let mut titles = std::iter::once(title).chain(std::iter::repeat(String::new()));
    let curve = |(points, best, y_label, x_label, standard_error): ScoreCurve| {
        let point = |(x, score, refined, as_good)| SweepPoint { x, score, refined, as_good };
        SweepCurve {
            title: titles.next().unwrap_or_default(),
            x_label,
            y_label,
            points: points.into_iter().map(point).collect(),
            best,
            standard_error,
        }
    };
    let curves: Vec<SweepCurve> = curves.into_iter().map(curve).collect();
    let png = py.detach(|| sweep_png(&curves, size)).map_err(argument)?;
    Ok(PyBytes::new(py, &png))
}
