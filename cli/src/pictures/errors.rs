//! Reconstruction error over the length of the average.

use std::path::Path;

use posthoc_ema::{Plan, Result};

use super::axis::{Axis, draw_bottom_axis, draw_left_axis, finite_range};
use super::canvas::{
    BLUE, Canvas, DrawError, Drawn, Frame, INK, MUTED, Point, SHADE, SMALL, Side, TEXT, TITLE, draw_svg, fit,
    text_width,
};
use super::file::{png_of_size, save};
use super::rounding::Rounding;
use crate::numbers::short_percent;

/// Sizes in pixels.
const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 336.0;
const FRAME: Frame = Frame { left: 66.0, top: 56.0, right: 500.0, bottom: 292.0 };

/// Most decades on the axis of the errors: smaller errors are as good as exact.
const MAX_DECADES: i32 = 12;

/// The reconstruction error over sigma_rel.
#[derive(Clone, Debug)]
pub struct ErrorCurve {
    /// Title of the picture.
    pub title: String,
    /// Points in increasing order of their length.
    pub points: Vec<ErrorPoint>,
    /// `sigma_rel` of each tracked profile at the time of the targets, and its name.
    pub tracked: Vec<(f64, String)>,
    /// Rounding of the snapshots, from which the noise floor is drawn.
    pub rounding: Option<Rounding>,
}

/// The error of one length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ErrorPoint {
    /// Length of the average.
    pub sigma_rel: f64,
    /// Relative error of the plan.
    pub relative_error: f64,
    /// Noise gain of the plan.
    pub noise_gain: f64,
}

impl ErrorPoint {
    /// Returns the point of a plan, unless its target is not a power function.
    pub fn of(plan: &Plan) -> Option<ErrorPoint> {
        let Plan { relative_error, noise_gain, .. } = *plan;
        plan.profile.as_sigma_rel().map(|sigma_rel| ErrorPoint { sigma_rel, relative_error, noise_gain })
    }
}

impl ErrorCurve {
    /// Returns the largest error between the shortest and the longest tracked profile. If fewer than two of them are on
    /// the axis, all lengths count.
    pub fn worst(&self) -> Option<ErrorPoint> {
        let tracked = self.tracked.iter().map(|(sigma_rel, _)| *sigma_rel).filter(|&sigma_rel| self.covers(sigma_rel));
        let (shortest, longest) =
            finite_range(tracked).filter(|(low, high)| low < high).unwrap_or((f64::NEG_INFINITY, f64::INFINITY));
        let between = self.points.iter().filter(|point| point.sigma_rel >= shortest && point.sigma_rel <= longest);
        let finite = between.filter(|point| point.relative_error.is_finite());
        finite.copied().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error))
    }

    /// Returns true if a length is between the ends of the curve.
    fn covers(&self, sigma_rel: f64) -> bool {
        let ends = self.points.first().zip(self.points.last());
        ends.is_some_and(|(first, last)| sigma_rel >= first.sigma_rel && sigma_rel <= last.sigma_rel)
    }

    /// Returns true if a length is at or next to a tracked one, where the error falls to zero.
    fn is_dip(&self, sigma_rel: f64) -> bool {
        let span = self.points.last().map_or(0.0, |p| p.sigma_rel) - self.points.first().map_or(0.0, |p| p.sigma_rel);
        self.tracked.iter().any(|(tracked, _)| (tracked - sigma_rel).abs() <= 0.01 * span)
    }

    fn noise_floor(&self, point: &ErrorPoint) -> f64 {
        self.rounding.as_ref().map_or(f64::NAN, |rounding| rounding.rms * point.noise_gain)
    }
}

/// Returns the lengths of a curve from `first` to `last`: evenly spaced, and denser near the tracked ones, where the
/// error falls to zero.
pub fn error_grid(first: f64, last: f64, tracked: &[f64]) -> Vec<f64> {
    const COUNT: i32 = 100;
    let step = (last - first) / f64::from(COUNT);
    let mut grid: Vec<f64> = (0..COUNT).map(|i| first + step * f64::from(i)).collect();
    grid.push(last);
    for tracked in tracked {
        let near = (0..8).map(|i| step * 0.5f64.powi(i));
        grid.extend(near.flat_map(|distance| [tracked - distance, tracked + distance]));
        grid.push(*tracked);
    }
    grid.retain(|sigma_rel| *sigma_rel >= first && *sigma_rel <= last);
    grid.sort_by(f64::total_cmp);
    grid.dedup();
    grid
}

/// Draws the reconstruction error over sigma_rel into a file, `.svg` or `.png`, which appears whole or not at all.
///
/// The axis of the errors is logarithmic. The tracked profiles are marked, and the worst length between them has a
/// label. The noise floor is shaded: everything below the noise gain times the rounding of the snapshots, relative to
/// the weights. The curve is relative to the profile, and an average moves by as much as the weights move. Plans of a
/// run predict both errors in one unit.
///
/// # Errors
/// [`Error::Io`](posthoc_ema::Error::Io) if the file cannot be written,
/// [`Error::Unexpected`](posthoc_ema::Error::Unexpected) for an extension other than `.svg` and `.png`.
pub fn draw_error_curve(path: &Path, curve: &ErrorCurve) -> Result<()> {
    save(path, draw(curve))
}

/// Draws the same picture in the middle of a white PNG of `size` pixels, as large as its proportions allow.
///
/// # Errors
/// The reason if the picture cannot be drawn, or has no pixel or too many.
pub fn error_curve_png(curve: &ErrorCurve, size: (u32, u32)) -> std::result::Result<Vec<u8>, String> {
    png_of_size(draw(curve), size)
}

fn draw(curve: &ErrorCurve) -> std::result::Result<String, DrawError> {
    let (x, y) = axes(curve);
    draw_svg(WIDTH, HEIGHT, |canvas| {
        canvas.text(&fit(&curve.title, TITLE, WIDTH - 32.0), (16.0, 15.0), TITLE, Side::Left, INK)?;
        draw_noise_floor(canvas, curve, &x, &y)?;
        draw_left_axis(canvas, FRAME, &y, 7, "relative error")?;
        draw_bottom_axis(canvas, FRAME, &x, |length| x.label(length), "length of the average (sigma_rel)")?;
        draw_tracked(canvas, curve, &x)?;
        let place = |point: &ErrorPoint| (x.place(point.sigma_rel), y.place(point.relative_error));
        let worst = curve.worst().map(|worst| Label::of(&worst, place(&worst)));
        if let Some(Label { text, center, .. }) = &worst {
            canvas.plate(text, *center, TEXT)?;
        }
        canvas.line(curve.points.iter().map(place), BLUE, 1.8)?;
        draw_floor_label(canvas, curve, &x, &y)?;
        let Some(Label { text, center, dot }) = &worst else { return Ok(()) };
        canvas.dot(*dot, 3.0, BLUE)?;
        canvas.text(text, *center, TEXT, Side::Center, BLUE)
    })
}

/// Returns axes that hold the errors and the noise floor, except for the dips at tracked profiles.
fn axes(curve: &ErrorCurve) -> (Axis, Axis) {
    let lengths = curve.points.iter().map(|point| point.sigma_rel);
    let (first, last) = finite_range(lengths).unwrap_or((0.05, 0.28));
    let errors = curve.points.iter().filter(|point| !curve.is_dip(point.sigma_rel)).map(|point| point.relative_error);
    let floors = curve.points.iter().map(|point| curve.noise_floor(point));
    let (bottom, top) = match finite_range(errors.chain(floors).filter(|value| *value > 0.0)) {
        Some((least, most)) => ((0.7 * least).log10().floor() as i32, (1.3 * most).log10().ceil() as i32),
        None => (-4, 0),
    };
    let bottom = bottom.clamp(top - MAX_DECADES, top - 2);
    (
        Axis::over(first, last, (FRAME.left, FRAME.right)),
        Axis::log(10f64.powi(bottom), 10f64.powi(top), (FRAME.bottom, FRAME.top)),
    )
}

/// Shades the area between the noise floor and the axis.
fn draw_noise_floor(canvas: &Canvas<'_>, curve: &ErrorCurve, x: &Axis, y: &Axis) -> Drawn {
    let place = |point: &ErrorPoint| (x.place(point.sigma_rel), y.place(curve.noise_floor(point)));
    let edge: Vec<Point> = curve.points.iter().map(place).filter(|point| point.1.is_finite()).collect();
    let (Some(first), Some(last)) = (edge.first(), edge.last()) else { return Ok(()) };
    let corners = [(last.0, FRAME.bottom), (first.0, FRAME.bottom)];
    canvas.area(edge.iter().copied().chain(corners), SHADE)
}

/// Draws the label of the shade in the widest gap between tracked profiles, inside the shade if there is room and above
/// it otherwise.
fn draw_floor_label(canvas: &Canvas<'_>, curve: &ErrorCurve, x: &Axis, y: &Axis) -> Drawn {
    let Some(rounding) = &curve.rounding else { return Ok(()) };
    let text = format!("rounding of the {} snapshots", rounding.dtypes);
    let half = 0.5 * text_width(&text, SMALL) + 6.0;
    let center = widest_gap(curve, x).clamp(FRAME.left + half, FRAME.right - half);
    let under = curve.points.iter().filter(|point| (x.place(point.sigma_rel) - center).abs() <= half);
    let edge = under.map(|point| y.place(curve.noise_floor(point))).filter(|y| y.is_finite());
    let (high, low) = edge.fold((FRAME.bottom, FRAME.top), |(high, low), y| (high.min(y), low.max(y)));
    let middle = if low + 18.0 <= FRAME.bottom { FRAME.bottom - 10.0 } else { high - 9.0 };
    canvas.text(&text, (center, middle), SMALL, Side::Center, INK)
}

/// Returns the middle of the widest gap between the tracked profiles and the edges of the frame.
fn widest_gap(curve: &ErrorCurve, x: &Axis) -> f64 {
    let tracked = curve.tracked.iter().map(|(at, _)| *at).filter(|at| x.holds(*at));
    let mut places: Vec<f64> = tracked.map(|at| x.place(at)).chain([FRAME.left, FRAME.right]).collect();
    places.sort_by(f64::total_cmp);
    let gaps = places.windows(2).max_by(|a, b| (a[1] - a[0]).total_cmp(&(b[1] - b[0])));
    gaps.map_or(FRAME.left, |gap| 0.5 * (gap[0] + gap[1]))
}

/// Draws a line at each tracked profile, and its name above in one of two rows if there is room.
fn draw_tracked(canvas: &Canvas<'_>, curve: &ErrorCurve, x: &Axis) -> Drawn {
    let mut tracked: Vec<&(f64, String)> = curve.tracked.iter().filter(|(at, _)| x.holds(*at)).collect();
    tracked.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut taken = [f64::NEG_INFINITY; 2];
    for (sigma_rel, name) in tracked {
        let at = x.place(*sigma_rel);
        let text = format!("tracked {name}");
        canvas.line([(at, FRAME.top), (at, FRAME.bottom)], MUTED, 0.8)?;
        let wide = text_width(&text, SMALL);
        let left = (at - 0.5 * wide).clamp(FRAME.left - 2.0, WIDTH - 8.0 - wide);
        if let Some(row) = taken.iter().position(|right| left >= right + 8.0) {
            taken[row] = left + wide;
            let middle = FRAME.top - 9.0 - 14.0 * row as f64;
            canvas.text(&text, (left + 0.5 * wide, middle), SMALL, Side::Center, MUTED)?;
        }
    }
    Ok(())
}

/// Label of the worst point.
struct Label {
    text: String,
    center: Point,
    dot: Point,
}

impl Label {
    fn of(worst: &ErrorPoint, dot: Point) -> Label {
        let text = format!("worst in between {}, at {:.3}", short_percent(worst.relative_error), worst.sigma_rel);
        let half = 0.5 * text_width(&text, TEXT) + 6.0;
        let above = dot.1 - 14.0;
        let y = if above > FRAME.top + 8.0 { above } else { dot.1 + 16.0 };
        Label { text, center: (dot.0.clamp(FRAME.left + half, FRAME.right - half), y), dot }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use posthoc_ema::Dtype;

    fn point(sigma_rel: f64, relative_error: f64) -> ErrorPoint {
        ErrorPoint { sigma_rel, relative_error, noise_gain: 1.5 }
    }

    fn curve(points: Vec<ErrorPoint>) -> ErrorCurve {
        let tracked = vec![(0.05, "0.05".into()), (0.25, "0.25".into()), (0.9, "beta 0.9".into())];
        ErrorCurve { title: "a run".into(), points, tracked, rounding: Some(Rounding::of_dtype(Dtype::F16)) }
    }

    #[test]
    fn worst_is_between_the_tracked_profiles() {
        let points = vec![
            point(0.02, 0.5),
            point(0.05, 1e-13),
            point(0.1, 2e-3),
            point(0.2, 1e-3),
            point(0.25, 0.0),
            point(0.28, 0.1),
        ];
        assert_eq!(curve(points.clone()).worst(), Some(points[2]));
        let one = ErrorCurve { tracked: vec![(0.05, "0.05".into())], ..curve(points.clone()) };
        assert_eq!(one.worst(), Some(points[0]));
        assert_eq!(curve(vec![point(0.1, f64::NAN)]).worst(), None);
    }

    #[test]
    fn svg_has_its_labels_and_a_curve_within_the_frame() {
        let grid = error_grid(0.02, 0.28, &[0.05, 0.25]);
        let error = |s: f64| ((s - 0.05) * (s - 0.25)).abs();
        let curve = curve(grid.iter().map(|&s| point(s, error(s))).collect());
        let (x, y) = axes(&curve);
        // The axis holds the errors and the floor at 3e-4, but not the dips at tracked profiles.
        assert_eq!((x.low, x.high, x.log), (0.02, 0.28, false));
        assert_eq!((y.low, y.high), (1e-4, 1e-1));
        let svg = draw(&curve).unwrap();
        for part in [
            "a run",
            "tracked 0.05",
            "tracked 0.25",
            "rounding of the f16 snapshots",
            "worst in between 1.0%, at 0.150",
            "(sigma_rel)",
        ] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        // A profile beyond the lengths is not drawn.
        assert!(!svg.contains("beta 0.9") && !svg.contains("NaN") && !svg.contains("inf"));
        let line = svg.split("<polyline").max_by_key(|part| part.len()).unwrap();
        let line = line.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(line.split_whitespace().count(), grid.len());
        for pair in line.split_whitespace() {
            let (x, y) = pair.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((660.0..=5000.0).contains(&x) && (560.0..=2920.0).contains(&y), "{pair}");
        }
    }

    #[test]
    fn degenerate_curves_draw_without_nan() {
        for points in [
            vec![],
            vec![point(0.1, 0.0)],
            vec![point(0.1, f64::NAN), point(0.2, f64::INFINITY)],
            vec![point(0.05, 0.0), point(0.1, f64::NAN), point(0.25, 0.0)],
            vec![point(1e-5, 1e-9), point(0.2, 1e9)],
        ] {
            let text = draw(&curve(points.clone())).unwrap();
            assert!(text.contains("relative error") && !text.contains("NaN"), "{points:?}");
            let bare = ErrorCurve { rounding: None, tracked: vec![], title: "long ".repeat(99), ..curve(points) };
            assert!(!draw(&bare).unwrap().contains("rounding"));
        }
    }

    #[test]
    fn grid_increases_and_has_the_tracked_lengths() {
        let grid = error_grid(0.02, 0.28, &[0.05, 0.28, 0.5]);
        assert!(grid.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(grid.first() == Some(&0.02) && grid.last() == Some(&0.28) && grid.contains(&0.05));
        assert!((100..150).contains(&grid.len()), "{}", grid.len());
        assert_eq!(error_grid(0.1, 0.1, &[]), [0.1]);
    }
}
