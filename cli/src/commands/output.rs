//! Printing to stdout and stderr, and progress bars.

use std::borrow::Cow;
use std::io::{ErrorKind, Write};
use std::thread;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use posthoc_ema::{Plan, escape_controls, is_control, warnings};

use crate::tables::held_back;

/// Escapes the control characters that could hide or forge terminal output: names come from files.
fn escape_control(text: &str) -> String {
    escape_controls(text, &['\n', '\t'])
}

/// Prints the warnings of plans with a large error to stderr.
pub fn print_warnings(plans: &[Plan]) {
    warnings(plans).iter().for_each(|warning| print_warning(warning));
}

/// Prints the reasons for plans without a predicted error, each once, events that make an error uncertain, and what
/// holds a regularisation back.
pub fn print_notes(plans: &[Plan]) {
    let mut reasons: Vec<String> =
        plans.iter().filter_map(|plan| plan.no_prediction).map(|why| why.to_string()).collect();
    reasons.dedup();
    reasons.iter().for_each(|why| print(&format!("No error is predicted: {why}.")));
    for plan in plans {
        if let Some(event) = &plan.event {
            print(&format!("{}: {event}.", plan.profile));
        }
    }
    plans.iter().filter_map(held_back).for_each(|text| print(&text));
}

/// Prints a warning to stderr.
pub fn print_warning(text: &str) {
    eprintln!("warning: {}", escape_control(text));
}

/// Prints an error to stderr.
pub fn print_error(text: &str) {
    eprintln!("error: {}", escape_control(text));
}

/// Prints to stderr: stdout holds something else.
pub fn print_report(text: &str) {
    eprintln!("{}", escape_control(text));
}

/// Ends the program with a help text or an error of the arguments, in colours if it goes to a terminal.
pub fn exit_with(error: &clap::Error) -> ! {
    let text = error.render().to_string();
    let escaped = escape_control(&text);
    if escaped == text {
        error.exit();
    }
    eprint!("{escaped}");
    std::process::exit(error.exit_code());
}

/// Prints to stdout. A reader that went away (`| head`) is not an error.
pub fn print(text: &str) {
    write(&escape_control(text));
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
    // serde_json escapes the control characters below U+0020 itself.
    let escape = |c: char| if is_control(c) { format!("\\u{:04x}", u32::from(c)) } else { c.into() };
    write(&document.to_string().chars().map(escape).collect::<String>());
}

/// Returns a bar of bytes on stderr, which is hidden if stderr is not a terminal.
pub fn byte_bar(total: u64, message: impl Into<Cow<'static, str>>) -> ProgressBar {
    bar(total, "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}").with_message(message)
}

/// Returns a bar of rounds on stderr, whose message and length change. It is hidden if stderr is not a terminal.
pub fn round_bar() -> ProgressBar {
    bar(0, "{msg} {wide_bar} {pos}/{len}")
}

/// Returns a spinner on stderr, which turns until it is cleared. It is hidden if stderr is not a terminal.
pub fn spinner(message: String) -> ProgressBar {
    let spinner = bar(0, "{spinner} {msg} {elapsed}").with_message(message);
    redraw_every(Duration::from_millis(100), &spinner);
    spinner
}

/// Redraws a bar at an interval. If the system cannot start a thread for it, the bar is redrawn when it changes.
pub fn redraw_every(interval: Duration, bar: &ProgressBar) {
    // indicatif would panic.
    let can_start = || thread::Builder::new().spawn(|| ()).is_ok_and(|thread| thread.join().is_ok());
    if !bar.is_hidden() && can_start() {
        bar.enable_steady_tick(interval);
    }
}

fn bar(total: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr()).with_style(style)
}

/// Formats a number of bytes: `1.10 GB`.
pub fn bytes(n: u64) -> String {
    indicatif::DecimalBytes(n).to_string()
}
