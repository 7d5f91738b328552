//! The sheet that pictures are drawn on: the one place that knows plotters.
//!
//! Lengths are in pixels of the SVG, with one decimal place. Pictures are 520 to 640 pixels wide: in a column of a paper,
//! letters of 12 pixels come out at 6 to 7 points.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// plotters draws on whole pixels: it gets a sheet so many times larger, which is shown at its own size.
const SCALE: f64 = 10.0;

/// plotters divides sizes of letters by this on the way to an SVG.
const LETTERS: f64 = 1.24;

/// What can go wrong; nothing does in memory.
pub type Fault = DrawingAreaErrorKind<std::io::Error>;
/// The result of all drawing.
pub type Drawn = Result<(), Fault>;

/// A colour; those here differ in grey, too.
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

/// Sizes of letters.
pub const TITLE: f64 = 13.0;
pub const TEXT: f64 = 12.0;
pub const SMALL: f64 = 11.0;

/// A place in pixels from the upper left corner.
pub type Point = (f64, f64);

/// Which point of a text is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Left,
    Center,
    Right,
}

/// A part of the sheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Frame {
    pub left: f64,
    pub top: f64,
    pub right: f64,
    pub bottom: f64,
}

/// A white sheet.
pub struct Canvas<'a>(DrawingArea<SVGBackend<'a>, Shift>);

/// Draws a picture of `width` by `height` pixels and returns it as an SVG document.
pub fn sheet(width: f64, height: f64, picture: impl FnOnce(&Canvas<'_>) -> Drawn) -> Result<String, Fault> {
    let mut text = String::new();
    let (w, h) = pixels((width, height));
    {
        let canvas = Canvas(SVGBackend::with_string(&mut text, (w as u32, h as u32)).into_drawing_area());
        canvas.0.fill(&WHITE)?;
        picture(&canvas)?;
        canvas.0.present()?;
    }
    let (drawn, shown) = (format!("width=\"{w}\" height=\"{h}\""), format!("width=\"{width}\" height=\"{height}\""));
    Ok(text.replacen(&drawn, &shown, 1))
}

impl Canvas<'_> {
    /// A line through points, `width` pixels wide. A point that is not finite interrupts it; a single one is a dot.
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

    /// A filled area; all its corners are finite.
    pub fn area(&self, corners: impl IntoIterator<Item = Point>, color: Rgb) -> Drawn {
        self.0.draw(&Polygon::new(corners.into_iter().map(pixels).collect::<Vec<_>>(), color.filled()))
    }

    /// A filled rectangle.
    pub fn bar(&self, from: Point, to: Point, color: Rgb) -> Drawn {
        self.0.draw(&Rectangle::new([pixels(from), pixels(to)], color.filled()))
    }

    /// A filled dot.
    pub fn dot(&self, center: Point, radius: f64, color: Rgb) -> Drawn {
        self.0.draw(&Circle::new(pixels(center), (SCALE * radius).round() as i32, color.filled()))
    }

    /// A ring, white within.
    pub fn ring(&self, center: Point, radius: f64, color: Rgb) -> Drawn {
        self.dot(center, radius, WHITE)?;
        let style = color.stroke_width((1.5 * SCALE) as u32);
        self.0.draw(&Circle::new(pixels(center), (SCALE * radius).round() as i32, style))
    }

    /// A diagonal cross.
    pub fn cross(&self, (x, y): Point, radius: f64, color: Rgb) -> Drawn {
        self.line([(x - radius, y - radius), (x + radius, y + radius)], color, 1.8)?;
        self.line([(x - radius, y + radius), (x + radius, y - radius)], color, 1.8)
    }

    /// A text on one line, vertically centred on its place.
    pub fn text(&self, text: &str, at: Point, size: f64, side: Side, color: Rgb) -> Drawn {
        self.0.draw(&Text::new(plain(text), pixels(at), style(size, side, &color)))
    }

    /// White behind a text on one line, centred on its place, so that no line crosses it.
    pub fn plate(&self, text: &str, (x, y): Point, size: f64) -> Drawn {
        let (wide, high) = (0.5 * width(text, size) + 2.0, 0.65 * size);
        self.bar((x - wide, y - high), (x + wide, y + high), WHITE)
    }

    /// A text that reads upwards, centred on its place.
    pub fn upright(&self, text: &str, at: Point, size: f64, color: Rgb) -> Drawn {
        let font = ("sans-serif", LETTERS * (SCALE * size)).into_font().transform(FontTransform::Rotate270);
        let style = TextStyle::from(font).color(&color).pos(Pos::new(HPos::Center, VPos::Center));
        self.0.draw(&Text::new(plain(text), pixels(at), style))
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
    let font = ("sans-serif", LETTERS * (SCALE * size)).into_font();
    TextStyle::from(font).color(color).pos(Pos::new(side, VPos::Center))
}

/// A text without what XML cannot hold.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || c == '\u{fffe}' || c == '\u{ffff}' { '\u{fffd}' } else { c }).collect()
}

/// How wide a text is, in pixels: DejaVu Sans, which is wider than most.
pub fn width(text: &str, size: f64) -> f64 {
    let of = |c: char| match c {
        'i' | 'j' | 'l' | '.' | ',' | ':' | ';' | '|' | '\'' | '!' | ' ' | 'I' => 0.33,
        'f' | 'r' | 't' | '(' | ')' | '/' | '-' | '⁰'..='₎' => 0.42,
        'm' | 'w' | 'M' | 'W' | '%' | '@' | '→' => 0.98,
        c if c.is_ascii_uppercase() => 0.74,
        c if c.is_ascii() => 0.63,
        // Greek, signs, and the replacement for what the font does not have.
        _ => 0.9,
    };
    text.chars().map(of).sum::<f64>() * size
}

/// A text cut to `most` pixels.
pub fn fit(text: &str, size: f64, most: f64) -> String {
    if width(text, size) <= most {
        return text.to_owned();
    }
    let mut cut: String = text.to_owned();
    while cut.pop().is_some() && width(&cut, size) + size > most {}
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sheets_have_their_size_and_a_decimal_place() {
        let svg = sheet(120.0, 80.0, |canvas| canvas.line([(1.25, 2.5), (3.0, f64::NAN), (10.04, 20.0)], INK, 0.5));
        let svg = svg.unwrap();
        assert!(svg.starts_with("<svg width=\"120\" height=\"80\" viewBox=\"0 0 1200 800\""), "{svg}");
        // The line is interrupted: what is left on each side is a dot.
        assert!(svg.contains("cx=\"13\" cy=\"25\"") && svg.contains("cx=\"100\" cy=\"200\""), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("polyline"), "{svg}");
    }

    #[test]
    fn texts_are_cut_and_made_plain() {
        assert_eq!(fit("short", 12.0, 100.0), "short");
        let long = fit(&"long ".repeat(50), 12.0, 100.0);
        assert!(long.ends_with('…') && width(&long, 12.0) < 105.0, "{long}");
        assert_eq!(fit("anything", 12.0, 0.0), "…");
        let svg = sheet(100.0, 20.0, |canvas| canvas.text("a\u{1}<b", (5.0, 5.0), TEXT, Side::Left, INK)).unwrap();
        assert!(svg.contains("a\u{fffd}&lt;b"), "{svg}");
    }
}
