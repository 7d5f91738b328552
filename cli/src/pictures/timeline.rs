//! Snapshots of a run over the steps of the training.

use std::path::Path;

use posthoc_ema::Result;

use super::axis::{Axis, draw_step_axis};
use super::canvas::{
    BLUE, Canvas, DrawError, Drawn, FAINT, Frame, GREEN, INK, MUTED, RED, SMALL, Side, TEXT, TITLE, draw_svg, fit,
    text_width,
};
use super::file::save;

/// Sizes in pixels.
const TOP: f64 = 52.0;
const ROW: f64 = 26.0;
const BELOW: f64 = 48.0;
const STEPS: f64 = 340.0;
const MARGIN: f64 = 14.0;

/// Width at which labels are cut.
const LABEL: f64 = 190.0;

/// The snapshots of a run.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// Title of the picture.
    pub title: String,
    /// One row for each tracked profile.
    pub rows: Vec<TimelineRow>,
    /// Step of the newest update that any file records.
    pub newest_update: Option<u64>,
    /// Step of the live state, and a note such as its size.
    pub state: Option<(u64, String)>,
}

/// The snapshots of one profile.
#[derive(Clone, Debug)]
pub struct TimelineRow {
    /// Name of the profile.
    pub label: String,
    /// Step of each snapshot, and true if it is sound.
    pub snapshots: Vec<(u64, bool)>,
    /// Note beside the row, such as the size of the snapshots.
    pub note: String,
}

/// Draws the snapshots of a run over the steps into a file, `.svg` or `.png`, which appears whole or not at all.
///
/// Each profile has a row. Damaged snapshots are crossed, and the newest update and the live state are marked.
///
/// # Errors
/// [`Error::Io`](posthoc_ema::Error::Io) if the file cannot be written,
/// [`Error::Unexpected`](posthoc_ema::Error::Unexpected) for an extension other than `.svg` and `.png`.
pub fn draw_timeline(path: &Path, timeline: &Timeline) -> Result<()> {
    save(path, draw(timeline))
}

impl Timeline {
    fn frame(&self) -> Frame {
        let labels = self.rows.iter().map(|row| text_width(&row.label, TEXT)).chain([text_width("live state", TEXT)]);
        let left = (MARGIN + labels.fold(0.0, f64::max).min(LABEL) + 10.0).round();
        let rows = self.rows.len() + usize::from(self.state.is_some());
        Frame { left, right: left + STEPS, top: TOP, bottom: TOP + ROW * rows.max(1) as f64 + 4.0 }
    }

    /// Returns the width of the notes to the right of the rows.
    fn notes_width(&self) -> f64 {
        let notes = self.rows.iter().map(|row| &row.note).chain(self.state.iter().map(|state| &state.1));
        notes.map(|note| text_width(note, SMALL)).fold(0.0, f64::max).min(LABEL)
    }

    /// Returns the last step that is drawn.
    fn last_step(&self) -> u64 {
        let stored = self.rows.iter().flat_map(|row| row.snapshots.iter().map(|snapshot| snapshot.0));
        stored.chain(self.newest_update).chain(self.state.iter().map(|state| state.0)).max().unwrap_or(0)
    }
}

fn draw(timeline: &Timeline) -> std::result::Result<String, DrawError> {
    let frame = timeline.frame();
    let wide = (frame.right + 12.0 + timeline.notes_width() + MARGIN).round();
    let axis = Axis::linear(0.0, timeline.last_step() as f64, (frame.left + 6.0, frame.right - 6.0));
    draw_svg(wide, frame.bottom + BELOW, |canvas| {
        let title = fit(&timeline.title, TITLE, wide - 2.0 * MARGIN);
        canvas.text(&title, (MARGIN, 18.0), TITLE, Side::Left, INK)?;
        draw_newest(canvas, timeline, frame, &axis)?;
        for (i, row) in timeline.rows.iter().enumerate() {
            draw_row(canvas, row, frame, &axis, frame.top + ROW * (i as f64 + 0.5))?;
        }
        draw_state(canvas, timeline, frame, &axis)?;
        draw_step_axis(canvas, frame, &axis)
    })
}

/// Draws the newest update as a line through all rows.
fn draw_newest(canvas: &Canvas<'_>, timeline: &Timeline, frame: Frame, axis: &Axis) -> Drawn {
    let Some(step) = timeline.newest_update else { return Ok(()) };
    let x = axis.place(step as f64);
    canvas.line([(x, frame.top - 4.0), (x, frame.bottom)], MUTED, 0.8)?;
    let text = format!("newest update {step}");
    let half = 0.5 * text_width(&text, SMALL);
    let center = x.clamp(MARGIN + half, (frame.right + 8.0 - half).max(MARGIN + half));
    canvas.text(&text, (center, frame.top - 13.0), SMALL, Side::Center, MUTED)
}

/// Draws the label, the line and the note of a row.
fn draw_edge(canvas: &Canvas<'_>, label: &str, note: &str, frame: Frame, y: f64) -> Drawn {
    canvas.text(&fit(label, TEXT, LABEL), (frame.left - 8.0, y), TEXT, Side::Right, INK)?;
    canvas.line([(frame.left, y), (frame.right, y)], FAINT, 0.8)?;
    canvas.text(&fit(note, SMALL, LABEL), (frame.right + 12.0, y), SMALL, Side::Left, MUTED)
}

fn draw_row(canvas: &Canvas<'_>, row: &TimelineRow, frame: Frame, axis: &Axis, y: f64) -> Drawn {
    draw_edge(canvas, &row.label, &row.note, frame, y)?;
    for &(step, _) in row.snapshots.iter().filter(|(_, sound)| *sound) {
        let x = axis.place(step as f64);
        canvas.line([(x, y - 6.0), (x, y + 6.0)], BLUE, 1.6)?;
    }
    // Damaged snapshots are drawn over the sound ones, which may be close.
    for &(step, _) in row.snapshots.iter().filter(|(_, sound)| !*sound) {
        canvas.cross((axis.place(step as f64), y), 4.5, RED)?;
    }
    Ok(())
}

fn draw_state(canvas: &Canvas<'_>, timeline: &Timeline, frame: Frame, axis: &Axis) -> Drawn {
    let Some((step, note)) = &timeline.state else { return Ok(()) };
    let y = frame.top + ROW * (timeline.rows.len() as f64 + 0.5);
    draw_edge(canvas, "live state", note, frame, y)?;
    canvas.dot((axis.place(*step as f64), y), 4.5, GREEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(label: &str, steps: &[u64]) -> TimelineRow {
        let snapshots = steps.iter().map(|&step| (step, step != 200)).collect();
        TimelineRow { label: label.into(), snapshots, note: format!("{} × 4 kB", steps.len()) }
    }

    #[test]
    fn svg_marks_every_snapshot() {
        let rows = vec![row("sigma_rel 0.05", &[100, 200, 300, 400]), row("beta 0.999 <odd>", &[300, 400])];
        let timeline =
            Timeline { title: "a run".into(), rows, newest_update: Some(440), state: Some((450, "1 MB".into())) };
        let svg = draw(&timeline).unwrap();
        for part in
            ["a run", "sigma_rel 0.05", "beta 0.999 &lt;odd&gt;", "4 × 4 kB", "newest update 440", "live state", "1 MB"]
        {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert_eq!(svg.matches("#005AA0").count(), 5);
        assert_eq!(svg.matches("#B41E1E").count(), 2);
    }

    #[test]
    fn degenerate_runs_draw_without_nan() {
        let one = Timeline {
            title: "x".repeat(300),
            rows: vec![row(&"y".repeat(300), &[7])],
            newest_update: Some(7),
            state: None,
        };
        let empty = Timeline { title: String::new(), rows: vec![], newest_update: None, state: None };
        let zero = Timeline { rows: vec![row("z", &[0])], newest_update: Some(0), ..empty.clone() };
        for timeline in [one, empty, zero] {
            let svg = draw(&timeline).unwrap();
            assert!(svg.contains("step") && !svg.contains("NaN") && !svg.contains("xxxxxxxxxxx".repeat(20).as_str()));
        }
    }
}
