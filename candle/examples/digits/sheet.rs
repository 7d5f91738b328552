//! Sheet of drawn digits as a grey PNG: two grids side by side, each under its caption.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};
use font8x8::{BASIC_FONTS, GREEK_FONTS, UnicodeFonts};

/// Pixels on each side of an image, and of a letter.
const SIDE: usize = 8;
const IMAGE_SCALE: usize = 6;
const LETTER_SCALE: usize = 2;
/// Distance between the corners of neighbouring images.
const PITCH: usize = SIDE * IMAGE_SCALE + 8;
const MARGIN: usize = 20;
const CAPTION_HEIGHT: usize = 34;
const HALVES_GAP: usize = 40;
const WHITE: u8 = 255;
const INK: u8 = 34;

/// One half of a sheet.
pub struct Grid<'a> {
    pub caption: &'a str,
    /// Images of 64 pixels, -1 for paper and 1 for ink, in the order of the grid's rows.
    pub images: &'a [Vec<f32>],
}

/// Writes `left` and `right` side by side, `columns` images in a row of each.
pub fn write(path: &Path, left: &Grid, right: &Grid, columns: usize) -> Result<()> {
    let rows = left.images.len().max(right.images.len()).div_ceil(columns);
    let right_x = MARGIN + columns * PITCH + HALVES_GAP;
    let width = right_x + columns * PITCH + MARGIN;
    let height = MARGIN + CAPTION_HEIGHT + rows * PITCH + MARGIN;
    let mut canvas = Canvas::new(width, height);
    canvas.grid(left, columns, MARGIN);
    canvas.grid(right, columns, right_x);
    canvas.write(path).with_context(|| format!("cannot write {}", path.display()))
}

struct Canvas {
    width: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        let pixels = vec![WHITE; width * height];
        Self { width, pixels }
    }

    fn grid(&mut self, grid: &Grid, columns: usize, x: usize) {
        self.caption(grid.caption, x, MARGIN);
        for (i, image) in grid.images.iter().enumerate() {
            let x = x + i % columns * PITCH;
            let y = MARGIN + CAPTION_HEIGHT + i / columns * PITCH;
            self.image(image, x, y);
        }
    }

    fn image(&mut self, image: &[f32], x: usize, y: usize) {
        for (i, &value) in image.iter().enumerate() {
            let (x, y) = (x + i % SIDE * IMAGE_SCALE, y + i / SIDE * IMAGE_SCALE);
            self.square(x, y, IMAGE_SCALE, grey(value));
        }
    }

    /// Draws a caption; characters that the font lacks stay blank.
    fn caption(&mut self, caption: &str, x: usize, y: usize) {
        for (i, letter) in caption.chars().enumerate() {
            let glyph = BASIC_FONTS.get(letter).or_else(|| GREEK_FONTS.get(letter));
            self.letter(glyph.unwrap_or_default(), x + i * SIDE * LETTER_SCALE, y);
        }
    }

    /// Draws a letter, given as one byte for each row with the lowest bit at the left.
    fn letter(&mut self, glyph: [u8; SIDE], x: usize, y: usize) {
        for (row, bits) in glyph.into_iter().enumerate() {
            for column in (0..SIDE).filter(|column| bits >> column & 1 == 1) {
                let (x, y) = (x + column * LETTER_SCALE, y + row * LETTER_SCALE);
                self.square(x, y, LETTER_SCALE, INK);
            }
        }
    }

    fn square(&mut self, x: usize, y: usize, side: usize, grey: u8) {
        for row in y..y + side {
            let start = row * self.width + x;
            self.pixels[start..start + side].fill(grey);
        }
    }

    fn write(&self, path: &Path) -> Result<()> {
        let height = self.pixels.len() / self.width;
        let file = BufWriter::new(File::create(path)?);
        let mut encoder = png::Encoder::new(file, self.width.try_into()?, height.try_into()?);
        encoder.set_color(png::ColorType::Grayscale);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        Ok(writer.finish()?)
    }
}

/// Converts -1 to white and 1 to nearly black; values outside are clipped.
fn grey(value: f32) -> u8 {
    let ink = (value.clamp(-1.0, 1.0) + 1.0) / 2.0;
    (f32::from(WHITE) + ink * (f32::from(INK) - f32::from(WHITE))) as u8
}
