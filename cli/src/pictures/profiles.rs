//! Planned averages: the profile of the target, that of the blend, and their difference.

use std::collections::BTreeMap;
use std::path::Path;

use posthoc_ema::math::Densities;
use posthoc_ema::{Error, Plan, Result, Weight};

use super::axis::{Axis, draw_step_axis, finite_range};
use super::canvas::{
    BLUE, Canvas, DrawError, Drawn, FAINT, Frame, GREEN, INK, MUTED, ORANGE, Point, Rgb, SHADE, SMALL, Side, TITLE,
    draw_svg, fit, text_width,
};
use super::file::save;
use super::rounding::Rounding;
use crate::numbers::{number, short_percent, tick};

/// Most targets of one picture.
pub const MAX_PANELS: usize = 8;

/// Size of a panel and positions of its parts, in pixels.
const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 382.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 502.0;
const PROFILES: (f64, f64) = (52.0, 196.0);
const DIFFERENCE: (f64, f64) = (216.0, 264.0);
const WEIGHTS: (f64, f64) = (284.0, 332.0);

/// Distance of a caption above its strip.
const CAPTION: f64 = 8.0;

/// Width of the keys beside the heading.
const KEYS: f64 = 172.0;

/// Most spans of a curve, about as many as can be printed.
const MAX_SPANS: usize = 876;

/// Share of the highest density below which a difference is drawn as zero.
const NEGLIGIBLE: f64 = 1e-6;

/// The panel of one target.
#[derive(Clone, Debug)]
pub struct ProfilePanel<'a> {
    /// Plan of the target.
    pub plan: &'a Plan,
    /// Densities of the plan.
    pub densities: Densities,
}

/// Planned averages, side by side.
#[derive(Clone, Debug)]
pub struct Profiles<'a> {
    /// One to [`MAX_PANELS`] targets.
    pub panels: Vec<ProfilePanel<'a>>,
    /// Names of the tracked profiles by their index.
    pub tracked: BTreeMap<usize, String>,
    /// Rounding of the snapshots.
    pub rounding: Option<Rounding>,
}

/// Draws targets into a file, `.svg` or `.png`, which appears whole or not at all.
///
/// The panel of a target has three strips over the time of training: the densities of the target and of the blend, as
/// multiples of the plain mean's; their difference on a scale of its own; and the weight of each snapshot.
///
/// # Errors
/// [`Error::Setting`] for no target or more than [`MAX_PANELS`], [`Error::Io`] if the file cannot be written,
/// [`Error::Unexpected`] for an extension other than `.svg` and `.png`.
pub fn draw_profiles(path: &Path, picture: &Profiles<'_>) -> Result<()> {
    let count = picture.panels.len();
    if !(1..=MAX_PANELS).contains(&count) {
        let reason = format!("a picture shows 1 to {MAX_PANELS} targets, not {count}: name fewer");
        return Err(Error::Setting { option: "plot", reason });
    }
    save(path, draw(picture))
}

fn draw(picture: &Profiles<'_>) -> std::result::Result<String, DrawError> {
    let columns = picture.panels.len().clamp(1, 2);
    let rows = picture.panels.len().div_ceil(columns);
    draw_svg(WIDTH * columns as f64, HEIGHT * rows as f64, |canvas| {
        for (i, panel) in picture.panels.iter().enumerate() {
            let origin = (WIDTH * (i % columns) as f64, HEIGHT * (i / columns) as f64);
            draw_panel(canvas, picture, panel, origin)?;
        }
        Ok(())
    })
}

fn draw_panel(canvas: &Canvas<'_>, picture: &Profiles<'_>, panel: &ProfilePanel<'_>, origin: Point) -> Drawn {
    let at = panel.plan.at as f64;
    let time = Axis::linear(0.0, at, (origin.0 + LEFT, origin.0 + RIGHT));
    let curves = Curves::of(&panel.densities, at);
    draw_heading(canvas, panel.plan, picture.rounding.as_ref(), origin)?;
    draw_densities(canvas, strip(origin, PROFILES), &time, &curves)?;
    draw_difference(canvas, strip(origin, DIFFERENCE), &time, &curves)?;
    draw_weights(canvas, strip(origin, WEIGHTS), &time, &panel.plan.weights, &picture.tracked)?;
    draw_step_axis(canvas, strip(origin, WEIGHTS), &time)
}

/// Returns the frame of a strip in the panel at `origin`.
fn strip(origin: Point, (top, bottom): (f64, f64)) -> Frame {
    Frame { left: origin.0 + LEFT, right: origin.0 + RIGHT, top: origin.1 + top, bottom: origin.1 + bottom }
}

/// Draws the title, the errors and the keys of a panel.
fn draw_heading(canvas: &Canvas<'_>, plan: &Plan, rounding: Option<&Rounding>, (x, y): Point) -> Drawn {
    let title = format!("{} at step {}", plan.profile, plan.at);
    let mut errors =
        format!("profile error {}, noise gain {}", short_percent(plan.relative_error), number(plan.noise_gain));
    if let Some(Rounding { rms, dtypes }) = rounding {
        errors += &format!(" ({dtypes} rounding: {} of the weights)", short_percent(plan.noise_gain * rms));
    }
    let room = RIGHT - 12.0;
    canvas.text(&fit(&title, TITLE, room - KEYS), (x + 12.0, y + 16.0), TITLE, Side::Left, INK)?;
    canvas.text(&fit(&errors, SMALL, room), (x + 12.0, y + 35.0), SMALL, Side::Left, MUTED)?;
    draw_keys(canvas, (x + RIGHT - KEYS + 10.0, y + 16.0))
}

/// Densities as multiples of the plain mean's, thinned to [`MAX_SPANS`].
struct Curves {
    times: Vec<f64>,
    target: Vec<f64>,
    blend: Vec<f64>,
    difference: Vec<f64>,
}

impl Curves {
    fn of(densities: &Densities, at: f64) -> Curves {
        let thin = densities.thinned(MAX_SPANS);
        let relative = |density: &[f64]| density.iter().map(|value| value * at).collect();
        Curves {
            target: relative(&thin.target),
            blend: relative(&thin.blend),
            difference: relative(&thin.difference()),
            times: thin.times,
        }
    }

    /// Returns the lowest and the highest of some densities and 0.
    fn range<'a>(densities: impl Iterator<Item = &'a f64>) -> (f64, f64) {
        finite_range(densities.copied().chain([0.0])).unwrap_or_default()
    }
}

/// Returns the corners of a piecewise constant curve.
fn step_corners(time: &Axis, value: &Axis, times: &[f64], density: &[f64]) -> Vec<Point> {
    let mut from = time.place(0.0);
    let mut corners = Vec::with_capacity(2 * times.len());
    for (&end, &density) in times.iter().zip(density) {
        let to = time.place(end);
        let y = value.place(density);
        corners.extend([(from, y), (to, y)]);
        from = to;
    }
    corners
}

/// Draws the densities of the target as a shade and of the blend as a line.
fn draw_densities(canvas: &Canvas<'_>, frame: Frame, time: &Axis, curves: &Curves) -> Drawn {
    let (low, high) = Curves::range(curves.target.iter().chain(&curves.blend));
    let value = Axis::linear(low, 1.06 * high, (frame.bottom, frame.top));
    let corners = step_corners(time, &value, &curves.times, &curves.target);
    if let (Some(first), Some(last)) = (corners.first().copied(), corners.last().copied()) {
        let zero = value.place(0.0);
        let finite = corners.into_iter().filter(|corner| corner.1.is_finite());
        canvas.area(finite.chain([(last.0, zero), (first.0, zero)]), SHADE)?;
    }
    draw_scale(canvas, frame, &value, &value.ticks(5))?;
    canvas.line(step_corners(time, &value, &curves.times, &curves.blend), BLUE, 1.4)?;
    let middle = (frame.left - 48.0, 0.5 * (frame.top + frame.bottom));
    canvas.upright("density (plain mean: 1)", middle, SMALL, MUTED)
}

/// Draws the keys of the shade and the line.
fn draw_keys(canvas: &Canvas<'_>, (x, y): Point) -> Drawn {
    canvas.bar((x, y - 5.0), (x + 16.0, y + 5.0), SHADE)?;
    canvas.text("target", (x + 21.0, y), SMALL, Side::Left, INK)?;
    canvas.line([(x + 68.0, y), (x + 84.0, y)], BLUE, 1.4)?;
    canvas.text("synthesized", (x + 89.0, y), SMALL, Side::Left, INK)
}

/// Draws the difference of the densities on a scale of its own.
fn draw_difference(canvas: &Canvas<'_>, frame: Frame, time: &Axis, curves: &Curves) -> Drawn {
    let (low, high) = Curves::range(curves.difference.iter());
    let peak = Curves::range(curves.target.iter()).1;
    let most = (1.1 * high.max(-low)).max(NEGLIGIBLE * peak);
    let value = Axis::linear(-most, most, (frame.bottom, frame.top));
    draw_scale(canvas, frame, &value, &value.few_ticks())?;
    canvas.line(step_corners(time, &value, &curves.times, &curves.difference), INK, 1.0)?;
    canvas.text("difference", (frame.left, frame.top - CAPTION), SMALL, Side::Left, INK)
}

/// Draws a stem for each snapshot, with those of different profiles side by side.
fn draw_weights(
    canvas: &Canvas<'_>,
    frame: Frame,
    time: &Axis,
    weights: &[Weight],
    tracked: &BTreeMap<usize, String>,
) -> Drawn {
    let (low, high) = Curves::range(weights.iter().map(|weight| &weight.weight));
    let value = Axis::linear(1.1 * low, 1.1 * high, (frame.bottom - 4.0, frame.top + 4.0));
    draw_scale(canvas, frame, &value, &value.few_ticks())?;
    let zero = value.place(0.0);
    for weight in weights {
        let order = tracked.keys().position(|index| *index == weight.index).unwrap_or(weight.index);
        let apart = 1.6 * (order as f64 - 0.5 * (tracked.len().max(1) - 1) as f64);
        let x = time.place(weight.step as f64);
        let y = value.place(weight.weight);
        canvas.line([(x, frame.bottom), (x, frame.bottom - 3.0)], MUTED, 0.8)?;
        canvas.line([(x + apart, zero), (x + apart, y)], stem_color(order), 1.2)?;
    }
    let mut x = frame.left;
    let names = tracked.values().enumerate().map(|(order, name)| (name.as_str(), stem_color(order)));
    for (text, color) in std::iter::once(("weights of", INK)).chain(names) {
        let text = fit(text, SMALL, frame.right - x);
        canvas.text(&text, (x, frame.top - CAPTION), SMALL, Side::Left, color)?;
        x += text_width(&text, SMALL) + 8.0;
    }
    Ok(())
}

/// Returns the colour of the profile at a position among the tracked ones.
fn stem_color(order: usize) -> Rgb {
    [BLUE, ORANGE, GREEN, INK, MUTED][order % 5]
}

/// Draws the scale of a strip: a line at each tick, and a darker one at 0.
fn draw_scale(canvas: &Canvas<'_>, frame: Frame, value: &Axis, ticks: &[f64]) -> Drawn {
    for &at in ticks {
        let y = value.place(at);
        let color = if at == 0.0 { MUTED } else { FAINT };
        canvas.line([(frame.left, y), (frame.right, y)], color, 0.8)?;
        canvas.text(&tick(at), (frame.left - 6.0, y), SMALL, Side::Right, INK)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use posthoc_ema::Dtype;
    use posthoc_ema::math::{Profile, Retention, Schedule};
    use posthoc_ema::{At, Forecast};

    fn forecast(steps: u64) -> Forecast {
        let tracked = [0.05, 0.28].map(|s| Profile::sigma_rel(s).unwrap()).to_vec();
        Forecast { schedule: Schedule::default(), steps, keep: 20, retention: Retention::Latest, tracked }
    }

    fn svg(forecast: &Forecast, targets: &[Profile]) -> String {
        let plans = forecast.plans(targets, At::Latest).unwrap();
        let panel = |plan| ProfilePanel { plan, densities: forecast.densities(plan).unwrap() };
        let tracked = BTreeMap::from([(0, "sigma_rel 0.05".to_owned()), (1, "sigma_rel 0.28".to_owned())]);
        let rounding = Some(Rounding::of_dtype(Dtype::F16));
        draw(&Profiles { panels: plans.iter().map(panel).collect(), tracked, rounding }).unwrap()
    }

    #[test]
    fn svg_has_the_parts_of_a_target() {
        let text = svg(&forecast(20_000), &[Profile::sigma_rel(0.15).unwrap()]);
        for part in [
            "sigma_rel 0.15 at step 20000",
            "f16 rounding: ",
            "target",
            "synthesized",
            "difference",
            "weights of",
            "15k",
            "noise gain ",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("NaN") && text.starts_with("<svg width=\"520\" height=\"382\""));
        // One shade, and at least a stem for each of the 40 snapshots.
        assert_eq!(text.matches("<polygon").count(), 1);
        assert!(text.matches("stroke-width=\"12\"").count() >= 40);
    }

    #[test]
    fn all_kinds_of_targets_draw_without_nan() {
        let long = Profile::table((1..=50).map(|i| (f64::from(i) / 50.0, f64::from(i) / 50.0)).collect()).unwrap();
        let uniform = Profile::uniform(posthoc_ema::math::Window::Steps(300.0)).unwrap();
        let text = svg(&forecast(20_000), &[long, uniform, Profile::beta(0.9).unwrap()]);
        assert!(
            text.starts_with("<svg width=\"1040\" height=\"764\"") && !text.contains("NaN") && !text.contains("inf")
        );
        // A single snapshot.
        let text = svg(&Forecast { keep: 1, ..forecast(1000) }, &[Profile::sigma_rel(0.05).unwrap()]);
        assert!(text.contains("weights of") && !text.contains("NaN"), "{text}");
    }

    #[test]
    fn empty_picture_is_refused() {
        let picture = Profiles { panels: vec![], tracked: BTreeMap::new(), rounding: None };
        let text = draw_profiles(Path::new("a.svg"), &picture).unwrap_err().to_string();
        assert!(text.contains("1 to 8 targets, not 0"), "{text}");
    }
}
