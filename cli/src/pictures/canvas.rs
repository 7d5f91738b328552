//! The canvas of all pictures, the only place that uses plotters.
//!
//! Lengths are in pixels of the SVG, with one decimal place. Pictures are 520 to 640 pixels wide: in a column of a
//! paper, letters of 12 pixels come out at 6 to 7 points.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Enlargement of the canvas while it is drawn, since plotters draws on whole pixels.
const SCALE: f64 = 10.0;

/// Divisor that plotters applies to sizes of letters in an SVG.
const FONT_SCALE: f64 = 1.24;

/// Error of plotters, which does not occur when drawing in memory.
pub type DrawError = DrawingAreaErrorKind<std::io::Error>;
/// Result of a drawing call.
pub type Drawn = Result<(), DrawError>;

/// A colour. Those below differ in grey, too.
pub type Rgb = RGBColor;

pub const INK: Rgb = RGBColor(34, 34, 34);
pub const MUTED: Rgb = RGBColor(110, 110, 110);
pub const GREY: Rgb = RGBColor(190, 190, 190);
pub const SHADE: Rgb = RGBColor(214, 214, 214);
pub const FAINT: Rgb = RGBColor(228, 228, 228);
pub const BLUE: Rgb = RGBColor(0, 90, 160);
pub const ORANGE: Rgb = RGBColor(214, 120, 30);
pub const GREEN: Rgb = RGBColor(60, 140, 90);
pub const RED: Rgb = RGBColor(180, 30, 30);

/// Height of letters in a title.
pub const TITLE: f64 = 13.0;
/// Height of letters in captions.
pub const TEXT: f64 = 12.0;
/// Height of letters at ticks and in notes.
pub const SMALL: f64 = 11.0;

/// A position in pixels from the upper left corner.
pub type Point = (f64, f64);

/// The side of a text that is at its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Left,
    Center,
    Right,
}

/// A rectangle of the canvas.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Frame {
    pub left: f64,
    pub top: f64,
    pub right: f64,
    pub bottom: f64,
}

/// A white canvas.
pub struct Canvas<'a>(DrawingArea<SVGBackend<'a>, Shift>);

/// Draws a picture of `width` by `height` pixels and returns it as an SVG document.
pub fn draw_svg(width: f64, height: f64, picture: impl FnOnce(&Canvas<'_>) -> Drawn) -> Result<String, DrawError> {
    let mut text = String::new();
    let (w, h) = pixels((width, height));
    {
        let canvas = Canvas(SVGBackend::with_string(&mut text, (w as u32, h as u32)).into_drawing_area());
        canvas.0.fill(&WHITE)?;
        picture(&canvas)?;
        canvas.0.present()?;
    }
    let drawn = format!("width=\"{w}\" height=\"{h}\"");
    let shown = format!("width=\"{width}\" height=\"{height}\"");
    Ok(text.replacen(&drawn, &shown, 1))
}

impl Canvas<'_> {
    /// Draws a line through points, `width` pixels wide. A point that is not finite interrupts it. A single point is a
    /// dot.
    pub fn line(&self, points: impl IntoIterator<Item = Point>, color: Rgb, width: f64) -> Drawn {
        let mut piece = Vec::new();
        for point in points {
            if point.0.is_finite() && point.1.is_finite() {
                piece.push(point);
            } else {
                self.piece(std::mem::take(&mut piece), color, width)?;
            }
        }
        self.piece(piece, color, width)
    }

    fn piece(&self, points: Vec<Point>, color: Rgb, width: f64) -> Drawn {
        match points.as_slice() {
            [] => Ok(()),
            [point] => self.dot(*point, width, color),
            _ => {
                let points: Vec<(i32, i32)> = points.into_iter().map(pixels).collect();
                self.0.draw(&PathElement::new(points, color.stroke_width((SCALE * width).round() as u32)))
            }
        }
    }

    /// Draws a filled polygon, whose corners must be finite.
    pub fn area(&self, corners: impl IntoIterator<Item = Point>, color: Rgb) -> Drawn {
        self.0.draw(&Polygon::new(corners.into_iter().map(pixels).collect::<Vec<_>>(), color.filled()))
    }

    /// Draws a filled rectangle.
    pub fn bar(&self, from: Point, to: Point, color: Rgb) -> Drawn {
        self.0.draw(&Rectangle::new([pixels(from), pixels(to)], color.filled()))
    }

    /// Draws a filled dot.
    pub fn dot(&self, center: Point, radius: f64, color: Rgb) -> Drawn {
        self.0.draw(&Circle::new(pixels(center), (SCALE * radius).round() as i32, color.filled()))
    }

    /// Draws a ring that is white inside.
    pub fn ring(&self, center: Point, radius: f64, color: Rgb) -> Drawn {
        self.dot(center, radius, WHITE)?;
        let style = color.stroke_width((1.5 * SCALE) as u32);
        self.0.draw(&Circle::new(pixels(center), (SCALE * radius).round() as i32, style))
    }

    /// Draws a diagonal cross.
    pub fn cross(&self, (x, y): Point, radius: f64, color: Rgb) -> Drawn {
        self.line([(x - radius, y - radius), (x + radius, y + radius)], color, 1.8)?;
        self.line([(x - radius, y + radius), (x + radius, y - radius)], color, 1.8)
    }

    /// Draws a text on one line, vertically centred on its position.
    pub fn text(&self, text: &str, at: Point, size: f64, side: Side, color: Rgb) -> Drawn {
        self.0.draw(&Text::new(replace_invalid(text), pixels(at), style(size, side, &color)))
    }

    /// Draws white behind a centred text on one line, so that no line crosses it.
    pub fn plate(&self, text: &str, (x, y): Point, size: f64) -> Drawn {
        let half_width = 0.5 * text_width(text, size) + 2.0;
        let half_height = 0.65 * size;
        self.bar((x - half_width, y - half_height), (x + half_width, y + half_height), WHITE)
    }

    /// Draws a text that reads upwards, centred on its position.
    pub fn upright(&self, text: &str, at: Point, size: f64, color: Rgb) -> Drawn {
        let font = ("sans-serif", FONT_SCALE * (SCALE * size)).into_font().transform(FontTransform::Rotate270);
        let style = TextStyle::from(font).color(&color).pos(Pos::new(HPos::Center, VPos::Center));
        self.0.draw(&Text::new(replace_invalid(text), pixels(at), style))
    }
}

fn pixels((x, y): Point) -> (i32, i32) {
    ((SCALE * x).round() as i32, (SCALE * y).round() as i32)
}

fn style(size: f64, side: Side, color: &Rgb) -> TextStyle<'_> {
    let side = match side {
        Side::Left => HPos::Left,
        Side::Center => HPos::Center,
        Side::Right => HPos::Right,
    };
    let font = ("sans-serif", FONT_SCALE * (SCALE * size)).into_font();
    TextStyle::from(font).color(color).pos(Pos::new(side, VPos::Center))
}

/// Replaces the characters that XML cannot hold.
fn replace_invalid(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || c == '\u{fffe}' || c == '\u{ffff}' { '\u{fffd}' } else { c }).collect()
}

/// Estimates the width of a text in pixels, for DejaVu Sans, which is wider than most fonts.
pub fn text_width(text: &str, size: f64) -> f64 {
    let em = |c: char| match c {
        'i' | 'j' | 'l' | '.' | ',' | ':' | ';' | '|' | '\'' | '!' | ' ' | 'I' => 0.33,
        'f' | 'r' | 't' | '(' | ')' | '/' | '-' | '⁰'..='₎' => 0.42,
        'm' | 'w' | 'M' | 'W' | '%' | '@' | '→' => 0.98,
        c if c.is_ascii_uppercase() => 0.74,
        c if c.is_ascii() => 0.63,
        // Greek letters, signs, and the replacement character.
        _ => 0.9,
    };
    text.chars().map(em).sum::<f64>() * size
}

/// Cuts a text to at most `max_width` pixels.
pub fn fit(text: &str, size: f64, max_width: f64) -> String {
    if text_width(text, size) <= max_width {
        return text.to_owned();
    }
    let mut cut: String = text.to_owned();
    while cut.pop().is_some() && text_width(&cut, size) + size > max_width {}
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn svg_has_its_size_and_one_decimal_place() {
        let svg = draw_svg(120.0, 80.0, |canvas| canvas.line([(1.25, 2.5), (3.0, f64::NAN), (10.04, 20.0)], INK, 0.5));
        let svg = svg.unwrap();
        assert!(svg.starts_with("<svg width=\"120\" height=\"80\" viewBox=\"0 0 1200 800\""), "{svg}");
        // NaN interrupts the line and leaves a single point, drawn as a dot, on each side.
        assert!(svg.contains("cx=\"13\" cy=\"25\"") && svg.contains("cx=\"100\" cy=\"200\""), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("polyline"), "{svg}");
    }

    #[test]
    fn texts_are_cut_and_escaped() {
        assert_eq!(fit("short", 12.0, 100.0), "short");
        let long = fit(&"long ".repeat(50), 12.0, 100.0);
        assert!(long.ends_with('…') && text_width(&long, 12.0) < 105.0, "{long}");
        assert_eq!(fit("anything", 12.0, 0.0), "…");
        let svg = draw_svg(100.0, 20.0, |canvas| canvas.text("a\u{1}<b", (5.0, 5.0), TEXT, Side::Left, INK)).unwrap();
        assert!(svg.contains("a\u{fffd}&lt;b"), "{svg}");
    }
}
