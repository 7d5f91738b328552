//! Scales from values to pixels, and their ticks.

use super::canvas::{Canvas, Drawn, FAINT, Frame, INK, MUTED, SMALL, Side, TEXT, text_width};
use crate::numbers::{power, shortest, tick};

/// Largest ratio of the ends of an axis that is linear by choice.
const MAX_LINEAR_RATIO: f64 = 50.0;

/// Pixels between the labels of an upright axis and its frame.
const GAP: f64 = 6.0;

/// A scale from values to pixels.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    pub low: f64,
    pub high: f64,
    pub log: bool,
    /// Pixels of `low` and `high`.
    pub pixels: (f64, f64),
}

impl Axis {
    /// Returns a linear scale. A scale over a single value gets some room around it.
    pub fn linear(low: f64, high: f64, pixels: (f64, f64)) -> Axis {
        let (low, high) = if high > low { (low, high) } else { (low - margin(low), low + margin(low)) };
        Axis { low, high, log: false, pixels }
    }

    /// Returns a logarithmic scale, from a value above 0.
    pub fn log(low: f64, high: f64, pixels: (f64, f64)) -> Axis {
        let high = if high > low { high } else { 10.0 * low };
        Axis { low, high, log: true, pixels }
    }

    /// Returns a linear scale, or a logarithmic one for positive values that are far apart.
    pub fn over(low: f64, high: f64, pixels: (f64, f64)) -> Axis {
        if low > 0.0 && high / low > MAX_LINEAR_RATIO {
            Axis::log(low, high, pixels)
        } else {
            Axis::linear(low, high, pixels)
        }
    }

    /// Returns the pixel of a value: an end for values beyond it, and NaN for NaN.
    pub fn place(&self, value: f64) -> f64 {
        if value.is_nan() {
            return f64::NAN;
        }
        let value = value.clamp(self.low, self.high);
        let share = if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.pixels.0 + share * (self.pixels.1 - self.pixels.0)
    }

    /// Returns true if a value is on the axis.
    pub fn holds(&self, value: f64) -> bool {
        value >= self.low && value <= self.high
    }

    /// Returns about `count` round numbers on the axis.
    pub fn ticks(&self, count: usize) -> Vec<f64> {
        if self.log { self.log_ticks(count) } else { self.linear_ticks(count) }
    }

    fn linear_ticks(&self, count: usize) -> Vec<f64> {
        let rough = (self.high - self.low) / count.max(1) as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0].map(|w| w * power).into_iter().find(|step| *step >= rough * (1.0 - 1e-9));
        let step = step.unwrap_or(10.0 * power);
        let first = (self.low / step - 1e-9).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last).map(|i| shortest(i as f64 * step)).collect()
    }

    /// Returns the label of a tick: a power of ten if any label of the axis must be one.
    pub fn label(&self, value: f64) -> String {
        if self.log && (self.low < 1e-3 || self.high > 1e5) { power(value) } else { tick(value) }
    }

    /// Returns the width of the widest label.
    fn widest(&self, count: usize) -> f64 {
        self.ticks(count).iter().map(|&value| text_width(&self.label(value), SMALL)).fold(0.0, f64::max)
    }

    /// Returns the pixels that an upright axis needs to its left, its caption included.
    pub fn left_margin(&self, count: usize) -> f64 {
        GAP + self.widest(count) + 28.0
    }

    /// Returns 0 and the largest round number towards each end, as ticks of a low strip.
    pub fn few_ticks(&self) -> Vec<f64> {
        let most = self.low.abs().max(self.high.abs());
        let power = 10f64.powf(most.log10().floor());
        let round = [5.0, 2.0, 1.0].map(|w| shortest(w * power)).into_iter().find(|round| *round <= most);
        let all = [-1.0, 0.0, 1.0].map(|sign| sign * round.unwrap_or(power));
        all.into_iter().filter(|tick| self.holds(*tick)).collect()
    }

    /// Returns powers of ten, thinned to about `count`. Over few decades 2 and 5 times them are added.
    fn log_ticks(&self, count: usize) -> Vec<f64> {
        let decades = (self.high / self.low).log10();
        let within: &[f64] = if decades < 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let every = (decades / count.max(1) as f64).ceil().max(1.0) as i32;
        let first = self.low.log10().floor() as i32;
        let last = self.high.log10().floor() as i32;
        let powers = (first..=last).filter(|exponent| exponent.rem_euclid(every) == 0);
        let all = powers.flat_map(|exponent| within.iter().map(move |w| shortest(w * 10f64.powi(exponent))));
        all.filter(|tick| *tick >= self.low * (1.0 - 1e-9) && *tick <= self.high * (1.0 + 1e-9)).collect()
    }
}

/// Returns the lowest and the highest of the finite values, if there are any.
pub fn finite_range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|value| value.is_finite()).fold(None, |range, value| {
        let (low, high) = range.unwrap_or((value, value));
        Some((value.min(low), value.max(high)))
    })
}

/// Returns the room around a single value.
fn margin(value: f64) -> f64 {
    if value == 0.0 { 1.0 } else { 0.1 * value.abs() }
}

/// Returns the label of a step on an axis that ends at `last`: 500, 20k, 1.5M.
fn step_label(step: f64, last: f64) -> String {
    let (unit, name) = match last {
        1e6.. => (1e6, "M"),
        1e4.. => (1e3, "k"),
        _ => (1.0, ""),
    };
    if step == 0.0 { "0".into() } else { format!("{}{name}", shortest(step / unit)) }
}

/// Draws the lower edge of a frame over the steps of a training.
pub fn draw_step_axis(canvas: &Canvas<'_>, frame: Frame, axis: &Axis) -> Drawn {
    draw_bottom_axis(canvas, frame, axis, |step| step_label(step, axis.high), "step")
}

/// Draws the lower edge of a frame with ticks, their labels, and a caption.
pub fn draw_bottom_axis(
    canvas: &Canvas<'_>,
    frame: Frame,
    axis: &Axis,
    label: impl Fn(f64) -> String,
    caption: &str,
) -> Drawn {
    canvas.line([(frame.left, frame.bottom), (frame.right, frame.bottom)], INK, 1.0)?;
    for tick in axis.ticks(6) {
        let x = axis.place(tick);
        canvas.line([(x, frame.bottom), (x, frame.bottom + 4.0)], INK, 1.0)?;
        canvas.text(&label(tick), (x, frame.bottom + 13.0), SMALL, Side::Center, INK)?;
    }
    canvas.text(caption, (0.5 * (frame.left + frame.right), frame.bottom + 31.0), TEXT, Side::Center, INK)
}

/// Draws the ticks at the left edge of a frame, faint lines across it, and a caption that reads upwards.
pub fn draw_left_axis(canvas: &Canvas<'_>, frame: Frame, axis: &Axis, count: usize, caption: &str) -> Drawn {
    for tick in axis.ticks(count) {
        let y = axis.place(tick);
        canvas.line([(frame.left, y), (frame.right, y)], FAINT, 0.8)?;
        canvas.text(&axis.label(tick), (frame.left - GAP, y), SMALL, Side::Right, INK)?;
    }
    let x = frame.left - GAP - axis.widest(count) - 12.0;
    canvas.upright(caption, (x, 0.5 * (frame.top + frame.bottom)), TEXT, MUTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_on_the_axis() {
        let ticks = |axis: Axis| axis.ticks(6);
        assert_eq!(ticks(Axis::linear(0.02, 0.28, (0.0, 1.0))), [0.05, 0.1, 0.15, 0.2, 0.25]);
        assert_eq!(ticks(Axis::linear(-0.3, 0.3, (0.0, 1.0))), [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]);
        assert_eq!(ticks(Axis::log(1e-8, 1.0, (0.0, 1.0))), [1e-8, 1e-6, 1e-4, 1e-2, 1.0]);
        assert_eq!(ticks(Axis::log(10.0, 300.0, (0.0, 1.0))), [10.0, 20.0, 50.0, 100.0, 200.0]);
        for axis in
            [Axis::linear(7.0, 7.0, (0.0, 1.0)), Axis::linear(0.0, 0.0, (0.0, 1.0)), Axis::log(3.0, 3.0, (0.0, 1.0))]
        {
            assert!(!axis.ticks(6).is_empty() && axis.ticks(6).iter().all(|&tick| axis.holds(tick)), "{axis:?}");
        }
    }

    #[test]
    fn values_map_to_pixels_between_the_ends() {
        for axis in [Axis::linear(1.0, 100.0, (50.0, 10.0)), Axis::over(1.0, 100.0, (50.0, 10.0))] {
            assert_eq!((axis.place(1.0), axis.place(100.0)), (50.0, 10.0));
            assert_eq!((axis.place(-5.0), axis.place(f64::INFINITY)), (50.0, 10.0));
            assert!(axis.place(f64::NAN).is_nan() && !axis.holds(f64::NAN));
        }
        assert_eq!(Axis::over(1.0, 100.0, (0.0, 10.0)).place(10.0), 5.0);
        assert!(!Axis::over(0.02, 0.28, (0.0, 1.0)).log && !Axis::over(-1.0, 100.0, (0.0, 1.0)).log);
    }

    #[test]
    fn labels_shorten_thousands_and_powers() {
        for (tick, last, text) in
            [(500.0, 800.0, "500"), (5000.0, 2e4, "5k"), (1.5e6, 2e6, "1.5M"), (5e5, 1e6, "0.5M"), (0.0, 1e6, "0")]
        {
            assert_eq!(step_label(tick, last), text);
        }
        assert_eq!(Axis::log(0.1, 1e6, (0.0, 1.0)).label(100.0), "10²");
    }

    #[test]
    fn low_strips_have_few_ticks() {
        assert_eq!(Axis::linear(-0.33, 0.33, (0.0, 1.0)).few_ticks(), [-0.2, 0.0, 0.2]);
        assert_eq!(Axis::linear(-0.1, 2.6, (0.0, 1.0)).few_ticks(), [0.0, 2.0]);
        assert_eq!(Axis::linear(-5e-7, 5e-7, (0.0, 1.0)).few_ticks(), [-5e-7, 0.0, 5e-7]);
    }
}
