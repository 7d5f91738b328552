//! Log lines of the library on stderr.

use std::io::{self, Write};

use posthoc_ema::escape_controls;

/// Writes warnings and errors of the library to stderr, without colours and with control characters escaped.
///
/// A subscriber that the process has already stays in place.
pub fn log_to_stderr() {
    let _ = tracing_subscriber::fmt()
        .with_writer(|| EscapedStderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::WARN)
        .with_target(false)
        .without_time()
        .try_init();
}

/// Stderr for whole lines, whose control characters are escaped: names of files are in them.
struct EscapedStderr;

impl Write for EscapedStderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = escape_controls(&String::from_utf8_lossy(line), &['\n']);
        io::stderr().write_all(text.as_bytes()).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
