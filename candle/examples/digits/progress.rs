//! Progress bars on standard error, drawn only if it is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// Makes a bar for `len` pieces of work.
pub fn bar(work: &'static str, len: u64) -> ProgressBar {
    let bar = ProgressBar::new(len).with_message(work);
    match ProgressStyle::with_template("{msg:10} {wide_bar} {human_pos}/{human_len}  {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
