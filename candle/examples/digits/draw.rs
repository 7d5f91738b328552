//! Chart of the held-out loss over the length of the average, for print: white ground, thin lines.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::combinators::WithKeyPoints;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::evaluate::{Average, Losses};

type SigmaRelAxis = WithKeyPoints<LogCoord<f64>>;
type LossChart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<SigmaRelAxis, RangedCoordf64>>;

const CHART_PIXELS: (u32, u32) = (720, 440);
/// Slightly more than the evaluated lengths, 0.01 to 0.288.
const SIGMA_REL_AXIS: std::ops::Range<f64> = 0.0092..0.31;
const SIGMA_REL_TICKS: [f64; 6] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.288];

/// Relative error of a profile above which an average is drawn as a rough one.
const ROUGH: f64 = 0.05;

const INK: RGBColor = RGBColor(34, 34, 34);
const FAINT: RGBColor = RGBColor(225, 225, 225);
const CURVE: RGBColor = RGBColor(0, 90, 160);
const LAST: RGBColor = RGBColor(190, 70, 30);

/// Writes `losses` as an SVG chart, sigma_rel on a logarithmic axis.
pub fn loss_chart(path: &Path, losses: &Losses) -> Result<()> {
    let (best, least) = losses.best().context("no averages to draw")?;
    let root = SVGBackend::new(path, CHART_PIXELS).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .margin_right(24)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(
            SIGMA_REL_AXIS.log_scale().with_key_points(SIGMA_REL_TICKS.to_vec()),
            loss_axis(losses, *least),
        )?;
    draw_axes(&mut chart)?;
    draw_last(&mut chart, losses.last)?;
    draw_averages(&mut chart, &losses.averages)?;
    draw_best(&mut chart, best.sigma_rel, *least, losses.last)?;
    root.present().with_context(|| format!("cannot write {}", path.display()))
}

/// Returns the range from `least` to the largest loss, with room for labels below and above.
fn loss_axis(losses: &Losses, least: f64) -> std::ops::Range<f64> {
    let greatest = losses.averages.iter().map(|a| a.1).fold(losses.last, f64::max);
    let span = greatest - least;
    least - 0.18 * span..greatest + 0.12 * span
}

fn draw_axes(chart: &mut LossChart) -> Result<()> {
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .label_style(text(14, &INK))
        .axis_desc_style(text(16, &INK))
        .x_desc("averaging length σ_rel")
        .y_desc("held-out flow-matching loss")
        .x_label_formatter(&|sigma_rel| format!("{sigma_rel}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .y_labels(8)
        .draw()?;
    Ok(())
}

fn draw_last(chart: &mut LossChart, loss: f64) -> Result<()> {
    let ends = [SIGMA_REL_AXIS.start, SIGMA_REL_AXIS.end].map(|sigma_rel| (sigma_rel, loss));
    chart.draw_series(DashedLineSeries::new(ends, 8, 5, LAST.stroke_width(2)))?;
    let label = format!("last weights: {loss:.3}");
    let style = text(15, &LAST).pos(Pos::new(HPos::Left, VPos::Bottom));
    let above_line = EmptyElement::at(ends[0]) + Text::new(label, (10, -6), style);
    chart.draw_series([above_line])?;
    Ok(())
}

/// Draws the curve, with a hollow dot for each average whose plan predicts a rough profile.
fn draw_averages(chart: &mut LossChart, averages: &[(Average, f64)]) -> Result<()> {
    let points = averages.iter().map(|(average, loss)| (average.sigma_rel, *loss));
    chart.draw_series(LineSeries::new(points, CURVE.stroke_width(2)))?;
    let is_rough = |average: &Average| average.predicted_error > ROUGH;
    let dot = |(average, loss): &(Average, f64)| {
        let fill = if is_rough(average) { WHITE } else { CURVE };
        EmptyElement::at((average.sigma_rel, *loss))
            + Circle::new((0, 0), 3, fill.filled())
            + Circle::new((0, 0), 3, CURVE)
    };
    chart.draw_series(averages.iter().map(dot))?;
    if let Some((first, loss)) = averages.first().filter(|(average, _)| is_rough(average)) {
        let label = format!("hollow: predicted profile error above {:.0}%", 100.0 * ROUGH);
        let style = text(13, &CURVE).pos(Pos::new(HPos::Left, VPos::Bottom));
        chart.draw_series([EmptyElement::at((first.sigma_rel, *loss)) + Text::new(label, (0, -12), style)])?;
    }
    Ok(())
}

fn draw_best(chart: &mut LossChart, sigma_rel: f64, loss: f64, last: f64) -> Result<()> {
    let percent = 100.0 * (loss / last - 1.0);
    let label = format!("best average, σ_rel {sigma_rel:.3}: {loss:.3} ({percent:+.1}%)");
    let style = text(15, &CURVE).pos(Pos::new(HPos::Center, VPos::Top));
    let dot =
        EmptyElement::at((sigma_rel, loss)) + Circle::new((0, 0), 5, CURVE.filled()) + Text::new(label, (0, 12), style);
    chart.draw_series([dot])?;
    Ok(())
}

fn text(size: u32, color: &'static RGBColor) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font()).color(color)
}
