//! What goes to stdout and stderr.

use std::io::{ErrorKind, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A text without the control characters that could hide or forge what a terminal shows: names come from files.
fn plain(text: &str) -> String {
    let spelled =
        |c: char| if c.is_control() && !"\n\t".contains(c) { c.escape_default().to_string() } else { c.into() };
    text.chars().map(spelled).collect()
}

/// Prints a line to stderr.
pub fn tell(text: &str) {
    eprintln!("{}", plain(text));
}

/// Prints to stdout. A reader that went away (`| head`) is no error.
pub fn print(text: &str) {
    write(&plain(text));
}

fn write(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let written =
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.write_all(b"\n")).and_then(|()| stdout.flush());
    if let Err(error) = written
        && error.kind() != ErrorKind::BrokenPipe
    {
        eprintln!("error: cannot write to stdout: {error}");
        std::process::exit(1);
    }
}

/// Prints a JSON document.
pub fn print_json(document: &serde_json::Value) {
    // Those below a space are spelled out already.
    let spelled = |c: char| if c.is_control() { format!("\\u{:04x}", u32::from(c)) } else { c.into() };
    write(&document.to_string().chars().map(spelled).collect::<String>());
}

/// A bar of bytes on stderr; none where stderr is no terminal.
pub fn byte_bar(total: u64, what: &'static str) -> ProgressBar {
    bar(total, "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}").with_message(what)
}

/// A bar of rounds on stderr, whose message and length change; none where stderr is no terminal.
pub fn round_bar() -> ProgressBar {
    bar(0, "{msg} {wide_bar} {pos}/{len}")
}

/// A sign of work on stderr that goes until it is cleared; none where stderr is no terminal.
pub fn spinner(what: String) -> ProgressBar {
    let spinner = bar(0, "{spinner} {msg} {elapsed}").with_message(what);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

fn bar(total: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr()).with_style(style)
}

/// A number of bytes for people.
pub fn bytes(n: u64) -> String {
    indicatif::DecimalBytes(n).to_string()
}
