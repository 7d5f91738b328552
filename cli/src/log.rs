//! Log lines of the library on stderr.

use std::fmt::Debug;
use std::io::{self, Write};

use posthoc_ema::{ACCURACY_LOG, escape_controls};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// Writes warnings and errors of the library to stderr, without colours and with control characters escaped.
///
/// Those of averages that are far from what was asked for go to `inaccurate` instead: the program's commands have
/// printed them already, and Python has warnings of its own. A subscriber that the process has already stays in place.
pub fn log_to_stderr(inaccurate: fn(String)) {
    let lines = tracing_subscriber::fmt()
        .with_writer(|| EscapedStderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::WARN)
        .with_target(false)
        .without_time()
        .finish();
    let _ = tracing::subscriber::set_global_default(lines.with(AccuracyWarnings(inaccurate)));
}

/// Takes the warnings of [`ACCURACY_LOG`] out of the log.
struct AccuracyWarnings(fn(String));

impl<S: Subscriber> Layer<S> for AccuracyWarnings {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if event.metadata().target() != ACCURACY_LOG {
            return true;
        }
        let mut message = Message::default();
        event.record(&mut message);
        (self.0)(message.0);
        false
    }
}

/// Text of a log line.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
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
