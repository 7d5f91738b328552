//! The option `--plot`.

use std::path::{Path, PathBuf};

use clap::Args;
use posthoc_ema::Result;
use posthoc_ema::fs::check_replaceable;

use crate::pictures::Format;

/// Files of a picture that a command draws beside its output.
#[derive(Args)]
pub struct PlotArgs {
    /// Draw a picture into this file, SVG or PNG by its ending; may be given more than once
    #[arg(long, value_name = "FILE", value_parser = picture_path)]
    plot: Vec<PathBuf>,
}

/// Parses a path whose extension names the format of a picture.
fn picture_path(text: &str) -> std::result::Result<PathBuf, String> {
    let path = PathBuf::from(text);
    Format::of(&path).map(|_| path).map_err(|_| "pictures are SVG or PNG: name a file that ends in .svg or .png".into())
}

impl PlotArgs {
    /// Returns true if the option was not given.
    pub fn is_empty(&self) -> bool {
        self.plot.is_empty()
    }

    /// Checks before any work that each file can be written.
    pub fn check(&self) -> Result<()> {
        self.plot.iter().try_for_each(|path| check_replaceable(path))
    }

    /// Draws into each file. Commands print first, so that a picture that fails loses nothing else.
    pub fn draw(&self, draw: impl Fn(&Path) -> Result<()>) -> Result<()> {
        self.plot.iter().try_for_each(|path| draw(path))
    }
}
