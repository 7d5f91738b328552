//! Pictures that commands draw beside what they print.

use std::path::{Path, PathBuf};

use crate::report::Format;
use clap::Args;
use posthoc_ema::Result;

/// Where a picture goes.
#[derive(Args)]
pub struct Plot {
    /// Draw a picture into this file, SVG or PNG by its ending; may be given more than once
    #[arg(long, value_name = "FILE", value_parser = path)]
    pub plot: Vec<PathBuf>,
}

/// The path of a picture, which tells its format.
fn path(text: &str) -> std::result::Result<PathBuf, String> {
    let path = PathBuf::from(text);
    Format::of(&path).map(|_| path).map_err(|_| "pictures are SVG or PNG: name a file that ends in .svg or .png".into())
}

impl Plot {
    /// Whether no picture was asked for.
    pub fn is_empty(&self) -> bool {
        self.plot.is_empty()
    }

    /// Draws into each file. Called after everything is printed: a picture that fails loses nothing else.
    pub fn draw(&self, draw: impl Fn(&Path) -> Result<()>) -> Result<()> {
        self.plot.iter().try_for_each(|path| draw(path))
    }
}
