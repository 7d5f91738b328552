//! The snapshots of a run over the steps of the training.

use std::path::Path;

use super::axis::{Axis, steps_below};
use super::canvas::{
    BLUE, Canvas, Drawn, FAINT, Fault, Frame, GREEN, INK, MUTED, RED, SMALL, Side, TEXT, TITLE, fit, sheet, width,
};
use super::file::save;
use posthoc_ema::Result;

/// Where things lie, in pixels.
const TOP: f64 = 52.0;
const ROW: f64 = 26.0;
const BELOW: f64 = 48.0;
const STEPS: f64 = 340.0;
const MARGIN: f64 = 14.0;

/// Labels are cut here.
const LABEL: f64 = 190.0;

/// The snapshots of a run.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// What the picture is of.
    pub title: String,
    /// One row for each tracked profile.
    pub rows: Vec<TimelineRow>,
    /// The newest update that any file tells of.
    pub newest: Option<u64>,
    /// The step of the live state, and what is to be said of it, such as its size.
    pub state: Option<(u64, String)>,
}

/// The snapshots of one profile.
#[derive(Clone, Debug)]
pub struct TimelineRow {
    /// The profile.
    pub label: String,
    /// The step of each snapshot, and whether it can be used.
    pub snapshots: Vec<(u64, bool)>,
    /// What is written beside them, such as their size.
    pub note: String,
}

/// Draws the snapshots of a run over the steps into a file, `.svg` or `.png`, which appears whole or not at all: a row for
/// each profile, damaged snapshots crossed, and the newest update and the live state marked.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) where the file cannot be written, [`Error::Unexpected`](crate::Error::Unexpected) for
/// another ending.
pub fn timeline(path: &Path, timeline: &Timeline) -> Result<()> {
    save(path, draw(timeline))
}

impl Timeline {
    fn frame(&self) -> Frame {
        let labels = self.rows.iter().map(|row| width(&row.label, TEXT)).chain([width("live state", TEXT)]);
        let left = (MARGIN + labels.fold(0.0, f64::max).min(LABEL) + 10.0).round();
        let rows = self.rows.len() + usize::from(self.state.is_some());
        Frame { left, right: left + STEPS, top: TOP, bottom: TOP + ROW * rows.max(1) as f64 + 4.0 }
    }

    /// How wide what stands to the right of the rows is.
    fn notes(&self) -> f64 {
        let notes = self.rows.iter().map(|row| &row.note).chain(self.state.iter().map(|state| &state.1));
        notes.map(|note| width(note, SMALL)).fold(0.0, f64::max).min(LABEL)
    }

    /// The last step that is drawn.
    fn last(&self) -> u64 {
        let stored = self.rows.iter().flat_map(|row| row.snapshots.iter().map(|snapshot| snapshot.0));
        stored.chain(self.newest).chain(self.state.iter().map(|state| state.0)).max().unwrap_or(0)
    }
}

fn draw(timeline: &Timeline) -> std::result::Result<String, Fault> {
    let frame = timeline.frame();
    let wide = (frame.right + 12.0 + timeline.notes() + MARGIN).round();
    let axis = Axis::linear(0.0, timeline.last() as f64, (frame.left + 6.0, frame.right - 6.0));
    sheet(wide, frame.bottom + BELOW, |canvas| {
        let title = fit(&timeline.title, TITLE, wide - 2.0 * MARGIN);
        canvas.text(&title, (MARGIN, 18.0), TITLE, Side::Left, INK)?;
        newest(canvas, timeline, frame, &axis)?;
        for (i, row) in timeline.rows.iter().enumerate() {
            draw_row(canvas, row, frame, &axis, frame.top + ROW * (i as f64 + 0.5))?;
        }
        state(canvas, timeline, frame, &axis)?;
        steps_below(canvas, frame, &axis)
    })
}

/// The newest update: a line through all rows.
fn newest(canvas: &Canvas<'_>, timeline: &Timeline, frame: Frame, axis: &Axis) -> Drawn {
    let Some(step) = timeline.newest else { return Ok(()) };
    let x = axis.place(step as f64);
    canvas.line([(x, frame.top - 4.0), (x, frame.bottom)], MUTED, 0.8)?;
    let text = format!("newest update {step}");
    let half = 0.5 * width(&text, SMALL);
    let center = x.clamp(MARGIN + half, (frame.right + 8.0 - half).max(MARGIN + half));
    canvas.text(&text, (center, frame.top - 13.0), SMALL, Side::Center, MUTED)
}

fn edge(canvas: &Canvas<'_>, label: &str, note: &str, frame: Frame, y: f64) -> Drawn {
    canvas.text(&fit(label, TEXT, LABEL), (frame.left - 8.0, y), TEXT, Side::Right, INK)?;
    canvas.line([(frame.left, y), (frame.right, y)], FAINT, 0.8)?;
    canvas.text(&fit(note, SMALL, LABEL), (frame.right + 12.0, y), SMALL, Side::Left, MUTED)
}

fn draw_row(canvas: &Canvas<'_>, row: &TimelineRow, frame: Frame, axis: &Axis, y: f64) -> Drawn {
    edge(canvas, &row.label, &row.note, frame, y)?;
    for &(step, _) in row.snapshots.iter().filter(|(_, sound)| *sound) {
        let x = axis.place(step as f64);
        canvas.line([(x, y - 6.0), (x, y + 6.0)], BLUE, 1.6)?;
    }
    // Over the sound ones, which may lie close.
    for &(step, _) in row.snapshots.iter().filter(|(_, sound)| !*sound) {
        canvas.cross((axis.place(step as f64), y), 4.5, RED)?;
    }
    Ok(())
}

fn state(canvas: &Canvas<'_>, timeline: &Timeline, frame: Frame, axis: &Axis) -> Drawn {
    let Some((step, note)) = &timeline.state else { return Ok(()) };
    let y = frame.top + ROW * (timeline.rows.len() as f64 + 0.5);
    edge(canvas, "live state", note, frame, y)?;
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
    fn every_snapshot_has_its_mark() {
        let rows = vec![row("sigma_rel 0.05", &[100, 200, 300, 400]), row("beta 0.999 <odd>", &[300, 400])];
        let timeline = Timeline { title: "a run".into(), rows, newest: Some(440), state: Some((450, "1 MB".into())) };
        let svg = draw(&timeline).unwrap();
        for part in
            ["a run", "sigma_rel 0.05", "beta 0.999 &lt;odd&gt;", "4 × 4 kB", "newest update 440", "live state", "1 MB"]
        {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        let (ticks, strokes) = (svg.matches("#005AA0").count(), svg.matches("#B41E1E").count());
        assert_eq!((ticks, strokes), (5, 2));
    }

    #[test]
    fn odd_runs_are_drawn_too() {
        let one =
            Timeline { title: "x".repeat(300), rows: vec![row(&"y".repeat(300), &[7])], newest: Some(7), state: None };
        let empty = Timeline { title: String::new(), rows: vec![], newest: None, state: None };
        let zero = Timeline { rows: vec![row("z", &[0])], newest: Some(0), ..empty.clone() };
        for timeline in [one, empty, zero] {
            let svg = draw(&timeline).unwrap();
            assert!(svg.contains("step") && !svg.contains("NaN") && !svg.contains("xxxxxxxxxxx".repeat(20).as_str()));
        }
    }
}
