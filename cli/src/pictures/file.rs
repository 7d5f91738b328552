//! Files of pictures: SVG as drawn, or PNG at twice its size. A PNG in memory has any size.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use posthoc_ema::fs::AtomicFile;
use posthoc_ema::{Error, Result};
use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::{self, Tree, fontdb};

use super::canvas::DrawError;

/// Pixels of a PNG for one pixel of the SVG.
const PNG_SCALE: f32 = 2.0;

/// Font of all PNG files, so that they need no fonts of the machine.
static FONT: &[u8] = include_bytes!("font/DejaVuSans-subset.ttf");

/// The file format of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Vector graphics.
    Svg,
    /// Pixels on white.
    Png,
}

impl Format {
    /// Returns the format of a file by its extension.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for an extension other than `.svg` and `.png`.
    pub fn of(path: &Path) -> Result<Format> {
        let has = |name: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(name));
        match (has("svg"), has("png")) {
            (true, _) => Ok(Format::Svg),
            (_, true) => Ok(Format::Png),
            _ => Err(Error::unexpected(path, "pictures are SVG or PNG: name a file that ends in .svg or .png")),
        }
    }
}

/// Writes a picture to a file, which appears whole or not at all.
pub(super) fn save(path: &Path, drawn: std::result::Result<String, DrawError>) -> Result<()> {
    let format = Format::of(path)?;
    let cannot = |error: &dyn std::fmt::Display| Error::unexpected(path, format!("cannot draw: {error}"));
    let svg = drawn.map_err(|error| cannot(&error))?;
    let bytes = match format {
        Format::Svg => svg.into_bytes(),
        Format::Png => png(&svg).map_err(|error| cannot(&error))?,
    };
    let file = AtomicFile::create_after_leftovers(path)?;
    file.write_at(0, &bytes)?;
    file.commit()
}

/// Renders an SVG document as a PNG on white.
fn png(svg: &str) -> std::result::Result<Vec<u8>, String> {
    let tree = parse(svg)?;
    let size = tree.size().to_int_size().scale_by(PNG_SCALE).ok_or("the picture is too large")?;
    render(&tree, (size.width(), size.height()), Transform::from_scale(PNG_SCALE, PNG_SCALE))
}

/// Renders a picture in the middle of a white PNG of `size` pixels, as large as its proportions allow.
pub(super) fn png_of_size(
    drawn: std::result::Result<String, DrawError>,
    size: (u32, u32),
) -> std::result::Result<Vec<u8>, String> {
    let tree = parse(&drawn.map_err(|error| error.to_string())?)?;
    let width = size.0 as f32;
    let height = size.1 as f32;
    let drawn = tree.size();
    let scale = (width / drawn.width()).min(height / drawn.height());
    let left = 0.5 * (width - scale * drawn.width());
    let top = 0.5 * (height - scale * drawn.height());
    render(&tree, size, Transform::from_row(scale, 0.0, 0.0, scale, left, top))
}

fn parse(svg: &str) -> std::result::Result<Tree, String> {
    Tree::from_str(svg, &OPTIONS).map_err(|error| error.to_string())
}

fn render(tree: &Tree, size: (u32, u32), transform: Transform) -> std::result::Result<Vec<u8>, String> {
    let pixels = Pixmap::new(size.0, size.1);
    let mut pixels =
        pixels.ok_or_else(|| format!("a picture of {} x {} pixels is empty or too large", size.0, size.1))?;
    pixels.fill(Color::WHITE);
    resvg::render(tree, transform, &mut pixels.as_mut());
    pixels.encode_png().map_err(|error| error.to_string())
}

/// Options that use the embedded font for every family.
static OPTIONS: LazyLock<usvg::Options<'static>> = LazyLock::new(|| {
    let mut fonts = fontdb::Database::new();
    fonts.load_font_source(fontdb::Source::Binary(Arc::new(FONT)));
    fonts.set_sans_serif_family("DejaVu Sans");
    usvg::Options { fontdb: Arc::new(fonts), ..usvg::Options::default() }
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pictures::canvas::{INK, Side, TEXT, draw_svg};

    #[test]
    fn picture_fills_a_png_of_any_size_in_its_middle() {
        let draw = || draw_svg(60.0, 20.0, |canvas| canvas.bar((0.0, 0.0), (60.0, 20.0), INK));
        let pixels = Pixmap::decode_png(&png_of_size(draw(), (30, 30)).unwrap()).unwrap();
        assert_eq!((pixels.width(), pixels.height()), (30, 30));
        let red = |x, y| pixels.pixel(x, y).unwrap().red();
        assert_eq!([red(15, 3), red(15, 27), red(1, 15), red(28, 15)], [255, 255, 34, 34]);
        for size in [(0, 30), (u32::MAX, u32::MAX)] {
            assert!(png_of_size(draw(), size).unwrap_err().contains("empty or too large"));
        }
    }

    /// Returns the dark pixels of a short text.
    fn ink(text: &str) -> Vec<bool> {
        let svg = draw_svg(60.0, 20.0, |canvas| canvas.text(text, (30.0, 10.0), TEXT, Side::Center, INK)).unwrap();
        let pixels = Pixmap::decode_png(&png(&svg).unwrap()).unwrap();
        assert_eq!((pixels.width(), pixels.height()), (120, 40));
        let corner = pixels.pixel(0, 0).unwrap();
        assert_eq!((corner.red(), corner.alpha()), (255, 255));
        pixels.pixels().iter().map(|pixel| pixel.red() < 220).collect()
    }

    /// Every letter of pictures has a glyph in the embedded font, and no other font is used.
    #[test]
    fn png_letters_need_no_system_fonts() {
        let count = |text: &str| ink(text).into_iter().filter(|dark| *dark).count();
        assert_eq!(count(""), 0);
        let missing = ink("\u{4e2d}");
        for letter in ('!'..='~').chain("σγβτλρμΔ−×·…→≤≥⁰¹²³⁴⁵⁶⁷⁸⁹⁻%±°é".chars())
        {
            let letter = letter.to_string();
            assert!(count(&letter) > 0 && ink(&letter) != missing, "`{letter}` is missing");
        }
        assert!(count("mmm") > 2 * count("m"));
    }

    #[test]
    fn format_follows_the_extension() {
        assert_eq!(Format::of(Path::new("a/b.SVG")).unwrap(), Format::Svg);
        assert_eq!(Format::of(Path::new("b.png")).unwrap(), Format::Png);
        for name in ["b.jpg", "png", "b.svg.gz", ""] {
            let text = Format::of(Path::new(name)).unwrap_err().to_string();
            assert!(text.contains(".svg or .png") && text.starts_with(name), "{text}");
        }
    }

    #[test]
    fn save_error_names_the_path() {
        let text = save(Path::new("/nonexistent/a.png"), draw_svg(9.0, 9.0, |_| Ok(()))).unwrap_err().to_string();
        assert!(text.contains("/nonexistent/a.png") && text.contains("check the path"), "{text}");
    }
}
