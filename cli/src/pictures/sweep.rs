//! Scores of a sweep over the length of the average.

use std::path::Path;

use posthoc_ema::Result;
use posthoc_ema::math::Family;
use posthoc_ema::sweep::{Sweep, SweepLine};

use super::axis::{Axis, draw_bottom_axis, draw_left_axis, finite_range};
use super::canvas::{
    BLUE, Canvas, DrawError, Drawn, FAINT, Frame, INK, MUTED, Point, RED, SMALL, Side, TEXT, TITLE, draw_svg, fit,
    text_width,
};
use super::file::{png_of_size, save};
use crate::numbers::{number, tick};
use crate::trials::part_name;

/// Sizes in pixels.
const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 340.0;
const FRAME: Frame = Frame { left: 60.0, top: 44.0, right: 500.0, bottom: 292.0 };

/// Height of each further panel.
const PANEL: f64 = 300.0;

/// Approximate number of ticks on the axis of the scores.
const TICKS: usize = 5;

/// Room above the scores, for labels.
const ABOVE: f64 = 26.0;
/// Room below the scores, for labels and failures.
const BELOW: f64 = 46.0;

/// The scores of many lengths.
#[derive(Clone, Debug)]
pub struct SweepCurve {
    /// Title of the picture.
    pub title: String,
    /// Name of the lengths, such as `sigma_rel`.
    pub x_label: String,
    /// Name of the scores.
    pub y_label: String,
    /// Lengths and scores, in any order.
    pub points: Vec<SweepPoint>,
    /// Index of the best point.
    pub best: Option<usize>,
    /// Standard error of the scores, if the evaluations were repeated.
    pub standard_error: Option<f64>,
}

impl SweepCurve {
    /// Returns the curve of each metric.
    pub fn all_of(sweep: &Sweep, title: &str) -> Vec<SweepCurve> {
        // The title is that of the whole picture.
        let title = |metric| if metric == 0 { title } else { "" };
        (0..sweep.metrics().len()).map(|metric| SweepCurve::of(sweep, metric, title(metric))).collect()
    }

    /// Returns the curve of each length of a joint sweep and each metric.
    pub fn of_lines(lines: &[SweepLine], title: &str) -> Vec<SweepCurve> {
        let curve = |(i, SweepLine { metric, part, sweep }): (usize, &SweepLine)| {
            let curve = SweepCurve::of(sweep, *metric, if i == 0 { title } else { "" });
            let x_label = format!("{} of {}", curve.x_label, part_name(part.as_deref()));
            SweepCurve { x_label, ..curve }
        };
        lines.iter().enumerate().map(curve).collect()
    }

    /// Returns the trials of a sweep in the family of the best by a metric, or of the first if none succeeded.
    fn of(sweep: &Sweep, metric: usize, title: &str) -> SweepCurve {
        let best_trial = sweep.best_by(metric);
        let shown = best_trial.or_else(|| sweep.trials().first()).and_then(|trial| trial.profile.family());
        let shown = shown.map(|(family, _)| family);
        let comparison = sweep.comparison(metric);
        let mut points = Vec::new();
        let mut best = None;
        for trial in sweep.trials() {
            let Some((_, x)) = trial.profile.family().filter(|(family, _)| Some(*family) == shown) else {
                continue;
            };
            if best.is_none() && best_trial.is_some_and(|best| best.profile == trial.profile) {
                best = Some(points.len());
            }
            let as_good = comparison.as_ref().is_some_and(|comparison| comparison.as_good.contains(&trial.profile));
            points.push(SweepPoint { x, score: trial.mean(metric), refined: trial.refined, as_good });
        }
        let x_label = shown.map_or("", Family::length_name).to_owned();
        let y_label = sweep.metrics()[metric].name.clone();
        let standard_error = comparison.map(|comparison| comparison.standard_error);
        SweepCurve { title: title.to_owned(), x_label, y_label, points, best, standard_error }
    }
}

/// The score of one length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SweepPoint {
    /// Length of the average.
    pub x: f64,
    /// Score, unless the evaluation failed.
    pub score: Option<f64>,
    /// True if the point is from the refinement of the search.
    pub refined: bool,
    /// True if repeats do not distinguish the point from the best one.
    pub as_good: bool,
}

impl SweepPoint {
    /// Returns the score of a point that can be drawn.
    fn finite(&self) -> Option<f64> {
        self.score.filter(|score| score.is_finite() && self.x.is_finite())
    }
}

/// Draws scores over lengths into a file, `.svg` or `.png`, which appears whole or not at all. Each curve has a panel,
/// one below the other.
///
/// Listed lengths are dots, refined ones are rings, failed ones are crosses at the axis, and the best has a label. If
/// evaluations were repeated, bars are one standard error to each side, and lengths as good as the best are shaded.
///
/// # Errors
/// [`Error::Io`](posthoc_ema::Error::Io) if the file cannot be written,
/// [`Error::Unexpected`](posthoc_ema::Error::Unexpected) for an extension other than `.svg` and `.png`.
pub fn draw_sweep(path: &Path, curves: &[SweepCurve]) -> Result<()> {
    save(path, draw(curves))
}

/// Draws the same picture in the middle of a white PNG of `size` pixels, as large as its proportions allow.
///
/// # Errors
/// The reason if the picture cannot be drawn, or has no pixel or too many.
pub fn sweep_png(curves: &[SweepCurve], size: (u32, u32)) -> std::result::Result<Vec<u8>, String> {
    png_of_size(draw(curves), size)
}

fn draw(curves: &[SweepCurve]) -> std::result::Result<String, DrawError> {
    let height = HEIGHT + PANEL * curves.len().saturating_sub(1) as f64;
    draw_svg(WIDTH, height, |canvas| {
        curves.iter().enumerate().try_for_each(|(i, curve)| draw_curve(canvas, curve, PANEL * i as f64))
    })
}

/// Draws a curve, moved down.
fn draw_curve(canvas: &Canvas<'_>, curve: &SweepCurve, down: f64) -> Drawn {
    let error = curve.standard_error.filter(|error| error.is_finite());
    let (frame, x, y) = axes(&curve.points, error.unwrap_or(0.0), down);
    canvas.text(&fit(&curve.title, TITLE, WIDTH - 32.0), (16.0, down + 18.0), TITLE, Side::Left, INK)?;
    draw_as_good(canvas, curve, frame, &x)?;
    draw_left_axis(canvas, frame, &y, TICKS, &fit(&curve.y_label, TEXT, frame.bottom - frame.top))?;
    let caption = fit(&curve.x_label, TEXT, frame.right - frame.left);
    draw_bottom_axis(canvas, frame, &x, |length| x.label(length), &caption)?;
    let mut sorted: Vec<&SweepPoint> = curve.points.iter().filter(|point| point.finite().is_some()).collect();
    sorted.sort_by(|a, b| a.x.total_cmp(&b.x));
    let place = |point: &SweepPoint| (x.place(point.x), y.place(point.finite().unwrap_or(f64::NAN)));
    if let Some(error) = error {
        for point in &sorted {
            let at = |score: f64| (x.place(point.x), y.place(score));
            let score = point.finite().unwrap_or(f64::NAN);
            canvas.line([at(score - error), at(score + error)], BLUE, 1.2)?;
        }
    }
    canvas.line(sorted.iter().map(|point| place(point)), BLUE, if error.is_some() { 0.5 } else { 1.0 })?;
    for point in &sorted {
        draw_mark(canvas, place(point), point.refined)?;
    }
    draw_failures(canvas, &curve.points, frame, &x)?;
    draw_keys(canvas, curve, frame)?;
    let best = curve.best.and_then(|best| curve.points.get(best)).filter(|point| point.finite().is_some());
    best.map_or(Ok(()), |best| draw_best(canvas, best, frame, place(best)))
}

/// Shades the lengths that are as good as the best.
fn draw_as_good(canvas: &Canvas<'_>, curve: &SweepCurve, frame: Frame, x: &Axis) -> Drawn {
    let as_good = curve.points.iter().filter(|point| point.as_good && point.finite().is_some());
    let Some((first, last)) = finite_range(as_good.map(|point| point.x)) else { return Ok(()) };
    canvas.bar((x.place(first) - 5.0, frame.top), (x.place(last) + 5.0, frame.bottom), FAINT)
}

/// Returns the axes and their frame, which leaves room for the labels of the scores.
fn axes(points: &[SweepPoint], error: f64, down: f64) -> (Frame, Axis, Axis) {
    let (first, last) = finite_range(points.iter().map(|point| point.x)).unwrap_or((0.0, 1.0));
    let (low, high) = finite_range(points.iter().filter_map(SweepPoint::finite)).unwrap_or((0.0, 1.0));
    let y = Axis::linear(low - error, high + error, (down + FRAME.bottom - BELOW, down + FRAME.top + ABOVE));
    let left = y.left_margin(TICKS).clamp(FRAME.left, 0.4 * WIDTH);
    let frame = Frame { left, top: down + FRAME.top, bottom: down + FRAME.bottom, ..FRAME };
    (frame, Axis::over(first, last, (frame.left + 12.0, frame.right - 12.0)), y)
}

fn draw_mark(canvas: &Canvas<'_>, at: Point, refined: bool) -> Drawn {
    if refined { canvas.ring(at, 3.2, BLUE) } else { canvas.dot(at, 3.2, BLUE) }
}

/// Returns the lengths without a score.
fn failed(points: &[SweepPoint]) -> impl Iterator<Item = f64> {
    points.iter().filter(|point| point.finite().is_none() && point.x.is_finite()).map(|point| point.x)
}

/// Draws crosses just above the axis.
fn draw_failures(canvas: &Canvas<'_>, points: &[SweepPoint], frame: Frame, x: &Axis) -> Drawn {
    failed(points).try_for_each(|length| canvas.cross((x.place(length), frame.bottom - 7.0), 3.5, RED))
}

/// Draws the keys of rings and crosses, if there are any.
fn draw_keys(canvas: &Canvas<'_>, curve: &SweepCurve, frame: Frame) -> Drawn {
    let points = &curve.points;
    let refined = points.iter().any(|point| point.refined && point.finite().is_some());
    let failed = failed(points).next().is_some();
    let mut x = frame.right;
    let mut key = |text: &str, draw: &dyn Fn(Point) -> Drawn| {
        canvas.text(text, (x, frame.top - 8.0), SMALL, Side::Right, MUTED)?;
        x -= text_width(text, SMALL) + 9.0;
        draw((x, frame.top - 8.0))?;
        x -= 14.0;
        Ok(())
    };
    if failed {
        key("failed", &|at| canvas.cross(at, 3.5, RED))?;
    }
    if refined {
        key("refined", &|at| canvas.ring(at, 3.2, BLUE))?;
    }
    if points.iter().any(|point| point.as_good) {
        key("as good", &|(x, y)| canvas.bar((x - 5.0, y - 5.0), (x + 5.0, y + 5.0), FAINT))?;
    }
    Ok(())
}

/// Draws the label of the best point.
fn draw_best(canvas: &Canvas<'_>, best: &SweepPoint, frame: Frame, (x, y): Point) -> Drawn {
    let score = best.score.map(number).unwrap_or_default();
    let text = format!("best: {score}, at {}", tick(rounded(best.x)));
    let half = 0.5 * text_width(&text, TEXT) + 6.0;
    let center = x.clamp(frame.left + half, frame.right - half);
    // A best score is the lowest or the highest: its label goes to the side without other scores.
    let lowest = y > 0.5 * (frame.top + frame.bottom);
    canvas.line([(x, y + if lowest { 26.0 } else { 6.0 }), (x, frame.bottom)], MUTED, 0.8)?;
    canvas.ring((x, y), 6.0, INK)?;
    draw_mark(canvas, (x, y), best.refined)?;
    canvas.text(&text, (center, if lowest { y + 17.0 } else { y - 15.0 }), TEXT, Side::Center, INK)
}

/// Rounds a length to four digits.
fn rounded(length: f64) -> f64 {
    format!("{length:.3e}").parse().unwrap_or(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: &[(f64, Option<f64>, bool)], best: Option<usize>) -> SweepCurve {
        let point = |&(x, score, refined)| SweepPoint { x, score, refined, as_good: false };
        SweepCurve {
            title: "a sweep".into(),
            x_label: "sigma_rel".into(),
            y_label: "loss".into(),
            points: points.iter().map(point).collect(),
            best,
            standard_error: None,
        }
    }

    #[test]
    fn repeats_have_bars_and_metrics_have_panels() {
        let points = [(0.1, Some(2.0), false), (0.3, Some(3.0), false), (0.2, Some(1.5), true), (0.25, None, false)];
        let mut repeated = curve(&points, Some(2));
        repeated.standard_error = Some(0.25);
        repeated.points[2].as_good = true;
        let other = SweepCurve { title: String::new(), y_label: "accuracy".into(), ..curve(&points, Some(1)) };
        let plain = draw(&[curve(&points, Some(2))]).unwrap();
        let svg = draw(&[repeated, other]).unwrap();
        assert!(svg.contains("as good") && svg.contains("loss") && svg.contains("accuracy"), "{svg}");
        // The curve of each panel, and a bar for each of the three scores.
        let is_blue = |part: &&str| part.split("/>").next().is_some_and(|tag| tag.contains("#005AA0"));
        let lines = |svg: &str| svg.split("<polyline").skip(1).filter(is_blue).count();
        assert_eq!((lines(&plain), lines(&svg)), (1, 5));
    }

    #[test]
    fn svg_marks_points_failures_and_the_best() {
        let points = [(0.1, Some(2.0), false), (0.3, Some(3.0), false), (0.2, Some(1.5), true), (0.25, None, false)];
        let svg = draw(&[curve(&points, Some(2))]).unwrap();
        for part in ["a sweep", "sigma_rel", "loss", "best: 1.500, at 0.2", "refined", "failed"] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        // Crosses of the failed length and of the key: two strokes each.
        assert_eq!(svg.matches("#B41E1E").count(), 4);
        let line = svg.split("<polyline").find(|part| part.contains("#005AA0")).unwrap();
        let line = line.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(line.split_whitespace().count(), 3);
    }

    #[test]
    fn degenerate_sweeps_draw_without_nan() {
        for (points, best) in [
            (vec![], None),
            (vec![(0.1, Some(1.0), false)], Some(0)),
            (vec![(0.1, None, false), (0.2, Some(f64::NAN), true)], Some(1)),
            (vec![(f64::NAN, Some(1.0), false), (1.0, Some(-1e9), false), (1e6, Some(1e9), false)], Some(9)),
        ] {
            let svg = draw(&[curve(&points, best)]).unwrap();
            assert!(svg.contains("loss") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
