//! Measurements as bars with marks at their limits, device by device.

use std::path::Path;

use posthoc_ema::Result;

use super::axis::Axis;
use super::canvas::{
    BLUE, Canvas, DrawError, Drawn, FAINT, GREEN, GREY, INK, MUTED, ORANGE, Rgb, SMALL, Side, TEXT, TITLE, draw_svg,
    text_width,
};
use super::file::save;
use crate::bench::{Measurement, Work};
use crate::numbers::{number, percent, tick};

/// Sizes in pixels.
const TOP: f64 = 40.0;
const HEADING: f64 = 26.0;
const ROW: f64 = 21.0;
const BAR: f64 = 13.0;
const BELOW: f64 = 58.0;
const BARS: f64 = 420.0;
const VALUES: f64 = 150.0;
const MARGIN: f64 = 16.0;

/// Draws measurements into a file, `.svg` or `.png`, which appears whole or not at all.
///
/// # Errors
/// [`Error::Io`](posthoc_ema::Error::Io) if the file cannot be written,
/// [`Error::Unexpected`](posthoc_ema::Error::Unexpected) for an extension other than `.svg` and `.png`.
pub fn draw_measurements(path: &Path, rows: &[Measurement], title: &str) -> Result<()> {
    save(path, draw(rows, title))
}

/// Returns the picture, whose height follows the number of rows.
fn draw(rows: &[Measurement], title: &str) -> std::result::Result<String, DrawError> {
    let panels: Vec<&[Measurement]> = rows.chunk_by(|a, b| a.device == b.device).collect();
    let height = TOP + panels.iter().map(|panel| panel_height(panel)).sum::<f64>();
    let labels = rows.iter().map(|row| text_width(&name(row), TEXT)).fold(0.0, f64::max);
    let left = (MARGIN + labels + 10.0).round();
    let width = (left + BARS + VALUES).max(2.0 * MARGIN + text_width(title, TITLE)).round();
    draw_svg(width, height, |canvas| {
        canvas.text(title, (MARGIN, TOP / 2.0), TITLE, Side::Left, INK)?;
        let mut top = TOP;
        for panel in panels {
            draw_panel(canvas, panel, left, top)?;
            top += panel_height(panel);
        }
        Ok(())
    })
}

fn panel_height(panel: &[Measurement]) -> f64 {
    HEADING + ROW * panel.len() as f64 + BELOW
}

/// Returns the label of a bar.
fn name(row: &Measurement) -> String {
    format!("{}: {}", row.work, row.name)
}

fn color(work: Work) -> Rgb {
    match work {
        Work::Limit => GREY,
        Work::Update => BLUE,
        Work::Offload => GREEN,
        Work::Blend => ORANGE,
    }
}

fn gigabytes(row: &Measurement) -> f64 {
    row.bytes_per_second / 1e9
}

/// Returns the rate of a row's limit in GB/s.
fn limit(row: &Measurement) -> Option<f64> {
    row.share_of_limit.map(|share| gigabytes(row) / share)
}

/// Draws one device: a heading, and its bars over an axis of its own.
fn draw_panel(canvas: &Canvas<'_>, panel: &[Measurement], left: f64, top: f64) -> Drawn {
    let axis = axis(panel, left);
    let first = top + HEADING;
    let bottom = first + ROW * panel.len() as f64;
    let device = panel.first().map_or("", |row| &row.device);
    canvas.text(device, (MARGIN, top + HEADING / 2.0), TITLE, Side::Left, INK)?;
    for rate in axis.ticks(6) {
        let x = axis.place(rate);
        canvas.line([(x, first), (x, bottom + 4.0)], FAINT, 1.0)?;
        canvas.text(&tick(rate), (x, bottom + 14.0), SMALL, Side::Center, INK)?;
    }
    for (i, row) in panel.iter().enumerate() {
        draw_row(canvas, row, &axis, first + ROW * (i as f64 + 0.5))?;
    }
    canvas.line([(left, first), (left, bottom)], INK, 1.0)?;
    let unit = if axis.log { "GB/s (logarithmic)" } else { "GB/s" };
    let caption = format!("{unit} read and written; the line at a bar is its limit, timed in turns with it");
    canvas.text(&caption, (left, bottom + 34.0), SMALL, Side::Left, MUTED)
}

fn draw_row(canvas: &Canvas<'_>, row: &Measurement, axis: &Axis, middle: f64) -> Drawn {
    let rate = gigabytes(row);
    let half = BAR / 2.0;
    canvas.text(&name(row), (axis.pixels.0 - 8.0, middle), TEXT, Side::Right, INK)?;
    let end = axis.place(rate);
    canvas.bar((axis.pixels.0, middle - half), (end, middle + half), color(row.work))?;
    let mut text = rate_label(rate);
    let mut right = end;
    if let (Some(limit), Some(share)) = (limit(row), row.share_of_limit) {
        let x = axis.place(limit);
        canvas.line([(x, middle - half - 3.0), (x, middle + half + 3.0)], INK, 2.0)?;
        text = format!("{text}, {}", percent(share));
        right = right.max(x);
    }
    canvas.text(&text, (right + 8.0, middle), SMALL, Side::Left, INK)
}

/// Formats a rate to three digits.
fn rate_label(rate: f64) -> String {
    match rate {
        100.0.. => format!("{rate:.0}"),
        10.0.. => format!("{rate:.1}"),
        1.0.. => format!("{rate:.2}"),
        _ => number(rate),
    }
}

/// Returns an axis that holds all rates and limits of a panel. It begins at zero unless they are far apart.
fn axis(panel: &[Measurement], left: f64) -> Axis {
    let rates = || panel.iter().flat_map(|row| [Some(gigabytes(row)), limit(row)]).flatten();
    let highest = rates().fold(f64::MIN_POSITIVE, f64::max);
    let lowest = rates().fold(highest, f64::min).max(1e-9 * highest);
    let log = Axis::over(lowest, highest, (left, left + BARS)).log;
    // The shortest bar on a logarithmic axis needs some length, too.
    let lowest = if log { 10f64.powf((lowest / 2.0).log10().floor()) } else { 0.0 };
    Axis { low: lowest, high: highest, log, pixels: (left, left + BARS) }
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
    fn svg_has_every_row_with_its_rate_and_share() {
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
    fn axis_covers_all_rates_and_limits() {
        let near = axis(&[row("cpu", "a", 10.0, Some(0.5)), row("cpu", "b", 3.0, None)], 100.0);
        assert!(!near.log && near.high == 20.0 && near.place(0.0) == 100.0 && near.place(20.0) == 100.0 + BARS);
        assert_eq!(near.ticks(6), [0.0, 5.0, 10.0, 15.0, 20.0]);
        let far = axis(&[row("cuda:0", "a", 4000.0, Some(1.0)), row("cuda:0", "b", 25.0, None)], 100.0);
        assert!(far.log && far.low == 10.0 && far.place(4000.0) == 100.0 + BARS && far.place(25.0) > 100.0);
        assert_eq!(far.ticks(6), [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0]);
    }
}
