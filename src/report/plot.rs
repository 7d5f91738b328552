//! Measurements as a picture: a bar for each, its limit as a mark, device by device.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::table::{number, percent};
use crate::bench::{Measurement, Work};
use crate::error::{Error, Result};
use crate::snapshot::AtomicFile;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Where things lie, in pixels.
const TITLE: i32 = 40;
const HEADING: i32 = 26;
const ROW: i32 = 21;
const BAR: i32 = 13;
const AXIS: i32 = 58;
const BARS: i32 = 420;
const VALUES: i32 = 150;
const MARGIN: i32 = 16;

/// How wide a character of a label is, about.
const CHARACTER: f64 = 6.9;

/// Rates further apart than this are drawn on a logarithmic axis.
const FAR: f64 = 50.0;

const INK: RGBColor = RGBColor(34, 34, 34);
const FAINT: RGBColor = RGBColor(228, 228, 228);

/// Draws measurements into an SVG file, which appears whole or not at all.
///
/// # Errors
/// [`Error::Io`] where the file cannot be written, [`Error::Unexpected`] where its name does not end in `.svg`.
pub fn plot(path: &Path, rows: &[Measurement], title: &str) -> Result<()> {
    if !path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg")) {
        return Err(Error::unexpected(path, "plots are SVG: name a file that ends in .svg"));
    }
    let text = draw(rows, title).map_err(|error| Error::unexpected(path, format!("cannot draw: {error}")))?;
    let file = AtomicFile::create(path)?;
    file.write_at(0, text.as_bytes())?;
    file.commit()
}

/// The picture as text; its height follows the number of rows.
fn draw(rows: &[Measurement], title: &str) -> Result<String, DrawingAreaErrorKind<std::io::Error>> {
    let panels: Vec<&[Measurement]> = rows.chunk_by(|a, b| a.device == b.device).collect();
    let height: i32 = TITLE + panels.iter().map(|panel| panel_height(panel)).sum::<i32>();
    let labels = rows.iter().map(|row| label(row).chars().count()).max().unwrap_or(0);
    let left = MARGIN + (labels as f64 * CHARACTER) as i32 + 10;
    let mut text = String::new();
    {
        let width = (left + BARS + VALUES).max(2 * MARGIN + (title.chars().count() as f64 * CHARACTER * 1.2) as i32);
        let size = (width as u32, height as u32);
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        area.fill(&WHITE)?;
        area.draw(&Text::new(title.to_owned(), (MARGIN, TITLE / 2), style(15, HPos::Left)))?;
        let mut top = TITLE;
        for panel in panels {
            draw_panel(&area, panel, left, top)?;
            top += panel_height(panel);
        }
        area.present()?;
    }
    Ok(text)
}

fn panel_height(panel: &[Measurement]) -> i32 {
    HEADING + ROW * panel.len() as i32 + AXIS
}

fn label(row: &Measurement) -> String {
    format!("{}: {}", row.work, row.name)
}

fn color(work: Work) -> RGBColor {
    match work {
        Work::Limit => RGBColor(190, 190, 190),
        Work::Update => RGBColor(0, 90, 160),
        Work::Offload => RGBColor(60, 140, 90),
        Work::Blend => RGBColor(200, 110, 30),
    }
}

fn gigabytes(row: &Measurement) -> f64 {
    row.bytes_per_second / 1e9
}

/// The rate of a row's limit.
fn limit(row: &Measurement) -> Option<f64> {
    row.share_of_limit.map(|share| gigabytes(row) / share)
}

/// One device: a heading, its bars over an axis of its own.
fn draw_panel(area: &Area<'_>, panel: &[Measurement], left: i32, top: i32) -> Drawn {
    let axis = Axis::over(panel, left);
    let (first, bottom) = (top + HEADING, top + HEADING + ROW * panel.len() as i32);
    let device = panel.first().map(|row| row.device.clone()).unwrap_or_default();
    area.draw(&Text::new(device, (MARGIN, top + HEADING / 2), style(15, HPos::Left)))?;
    for tick in axis.ticks() {
        let x = axis.pixel(tick);
        area.draw(&PathElement::new([(x, first), (x, bottom + 4)], FAINT))?;
        area.draw(&Text::new(tick_label(tick), (x, bottom + 14), style(12, HPos::Center)))?;
    }
    for (i, row) in panel.iter().enumerate() {
        draw_row(area, row, &axis, first + ROW * i as i32 + ROW / 2)?;
    }
    area.draw(&PathElement::new([(left, first), (left, bottom)], INK))?;
    let unit = if axis.log { "GB/s (logarithmic)" } else { "GB/s" };
    let caption = format!("{unit} read and written; the line at a bar is its limit, timed in turns with it");
    area.draw(&Text::new(caption, (left, bottom + 34), style(13, HPos::Left)))
}

fn draw_row(area: &Area<'_>, row: &Measurement, axis: &Axis, middle: i32) -> Drawn {
    let (rate, half) = (gigabytes(row), BAR / 2);
    area.draw(&Text::new(label(row), (axis.left - 8, middle), style(13, HPos::Right)))?;
    let end = axis.pixel(rate);
    area.draw(&Rectangle::new([(axis.left, middle - half), (end, middle + half)], color(row.work).filled()))?;
    let mut text = number_of(rate);
    let mut right = end;
    if let (Some(limit), Some(share)) = (limit(row), row.share_of_limit) {
        let x = axis.pixel(limit);
        area.draw(&PathElement::new([(x, middle - half - 3), (x, middle + half + 3)], INK.stroke_width(2)))?;
        text = format!("{text}, {}", percent(share));
        right = right.max(x);
    }
    area.draw(&Text::new(text, (right + 8, middle), style(12, HPos::Left)))
}

/// Three digits are plenty for a rate.
fn number_of(rate: f64) -> String {
    match rate {
        100.0.. => format!("{rate:.0}"),
        10.0.. => format!("{rate:.1}"),
        1.0.. => format!("{rate:.2}"),
        _ => number(rate),
    }
}

fn tick_label(tick: f64) -> String {
    // Ticks are 1, 2 or 5 times a power of ten: Rust's shortest form of one that was computed may not be.
    format!("{}", format!("{tick:.3e}").parse::<f64>().unwrap_or(tick))
}

fn style(size: u32, side: HPos) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font()).color(&INK).pos(Pos::new(side, VPos::Center))
}

/// From rates to pixels.
struct Axis {
    left: i32,
    log: bool,
    lowest: f64,
    highest: f64,
}

impl Axis {
    /// An axis that holds all rates and limits of a panel; one from zero unless they lie far apart.
    fn over(panel: &[Measurement], left: i32) -> Axis {
        let rates = || panel.iter().flat_map(|row| [Some(gigabytes(row)), limit(row)]).flatten();
        let highest = rates().fold(f64::MIN_POSITIVE, f64::max);
        let lowest = rates().fold(highest, f64::min).max(1e-9 * highest);
        let log = highest / lowest > FAR;
        // A bar on a logarithmic axis needs some length even where it is the shortest.
        let lowest = if log { 10f64.powf((lowest / 2.0).log10().floor()) } else { 0.0 };
        Axis { left, log, lowest, highest }
    }

    fn pixel(&self, rate: f64) -> i32 {
        let share = if self.log {
            (rate.max(self.lowest) / self.lowest).ln() / (self.highest / self.lowest).ln()
        } else {
            rate / self.highest
        };
        self.left + (share * f64::from(BARS)).round() as i32
    }

    /// Round numbers, far enough apart for their labels.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let decades = (self.highest / self.lowest).log10();
            let within: &[f64] = if decades < 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let first = self.lowest.log10().round() as i32;
            let all = (first..).take(decades as usize + 1).flat_map(|e| within.iter().map(move |w| w * 10f64.powi(e)));
            return all.filter(|tick| *tick <= self.highest).collect();
        }
        let rough = self.highest / 6.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|w| w * power).into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(10.0 * power);
        (0..).map(|i| f64::from(i) * step).take_while(|tick| *tick <= self.highest).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(device: &str, name: &str, rate: f64, share: Option<f64>) -> Measurement {
        Measurement {
            device: device.into(),
            name: name.into(),
            work: if share.is_some() { Work::Update } else { Work::Limit },
            bytes: 1_000_000_000,
            seconds_median: 1.0 / rate,
            seconds_all: vec![1.0 / rate],
            bytes_per_second: 1e9 * rate,
            limit: share.map(|_| "a limit".into()),
            share_of_limit: share,
        }
    }

    #[test]
    fn every_row_is_drawn_with_its_figures() {
        let rows = [
            row("cpu", "copy & move", 27.3, None),
            row("cpu", "f32", 41.25, Some(0.9)),
            row("cuda:0", "f32", 4012.0, Some(0.875)),
        ];
        let text = draw(&rows, "a <title>").unwrap();
        for part in ["<svg", "a &lt;title&gt;", "copy &amp; move", "41.2, 90%", "4012, 88%", "cuda:0", "GB/s", "</svg>"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn axes_hold_all_rates_and_limits() {
        let near = Axis::over(&[row("cpu", "a", 10.0, Some(0.5)), row("cpu", "b", 3.0, None)], 100);
        assert!(!near.log && near.highest == 20.0 && near.pixel(0.0) == 100 && near.pixel(20.0) == 100 + BARS);
        assert_eq!(near.ticks(), [0.0, 5.0, 10.0, 15.0, 20.0]);
        let far = Axis::over(&[row("cuda:0", "a", 4000.0, Some(1.0)), row("cuda:0", "b", 25.0, None)], 100);
        assert!(far.log && far.lowest == 10.0 && far.pixel(4000.0) == 100 + BARS && far.pixel(25.0) > 100);
        assert_eq!(far.ticks(), [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0]);
    }

    #[test]
    fn a_file_that_is_no_svg_is_refused() {
        let text = plot(Path::new("/nonexistent/plot.png"), &[], "").unwrap_err().to_string();
        assert!(text.contains("plot.png") && text.contains(".svg"), "{text}");
        assert!(plot(Path::new("/nonexistent/plot.svg"), &[], "").unwrap_err().to_string().contains("check the path"));
    }
}
