//! Bars on stderr; none where stderr is no terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar for `len` pieces of the work named.
pub fn bar(work: &'static str, len: u64) -> ProgressBar {
    let bar = ProgressBar::new(len).with_message(work);
    match ProgressStyle::with_template("{msg:10} {wide_bar} {human_pos}/{human_len}  {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
