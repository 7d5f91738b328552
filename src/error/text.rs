//! Names and reasons as text of a message.

use std::ffi::OsStr;

/// Largest number of bytes of a name or reason in a message.
pub(super) const MAX_SHOWN: usize = 4000;

/// Formats a name or a reason for one line of a message: control characters are escaped, and the middle of longer text
/// is left out.
#[doc(hidden)]
pub fn shown(text: &(impl AsRef<OsStr> + ?Sized)) -> String {
    let text = text.as_ref().to_string_lossy();
    if text.len() <= MAX_SHOWN {
        return escape_controls(&text, &[]);
    }
    let head = (0..=MAX_SHOWN / 2).rfind(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let tail = (text.len() - MAX_SHOWN / 2..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
    let left_out = tail - head;
    let escape = |part: &str| escape_controls(part, &[]);
    format!("{} [{left_out} bytes] {}", escape(&text[..head]), escape(&text[tail..]))
}

/// Escapes the characters of [`is_control`], except those in `kept`.
#[doc(hidden)]
pub fn escape_controls(text: &str, kept: &[char]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if is_control(c) && !kept.contains(&c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Returns true for characters that could hide or forge the output of a terminal: control characters, and those of
/// Unicode that end a line or change the direction of the text after them.
#[doc(hidden)]
pub fn is_control(c: char) -> bool {
    let is_separator = matches!(c, '\u{2028}' | '\u{2029}');
    let is_direction = matches!(
        c,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    c.is_control() || is_separator || is_direction
}

/// Returns the numbers of processes for a message: "processes 0, 3 and 5".
pub(super) fn named_processes(processes: &[usize]) -> String {
    let mut numbers: Vec<String> = processes.iter().take(MOST_NAMES).map(usize::to_string).collect();
    if processes.len() > MOST_NAMES {
        numbers.push(format!("{} more", processes.len() - MOST_NAMES));
    }
    match numbers.split_last() {
        None => "no process".to_owned(),
        Some((only, [])) => format!("process {only}"),
        Some((last, others)) => format!("processes {} and {last}", others.join(", ")),
    }
}

/// Most names in a message, and most letters of each.
const MOST_NAMES: usize = 10;
const MOST_LETTERS: usize = 60;

/// Returns a list of names for a message: `a`, `b` and `c`.
pub(crate) fn listed<T: AsRef<str>>(names: &[T]) -> String {
    let short = |name: &T| name.as_ref().chars().take(MOST_LETTERS).collect::<String>();
    let mut quoted: Vec<String> = names.iter().take(MOST_NAMES).map(|name| format!("`{}`", short(name))).collect();
    if names.len() > MOST_NAMES {
        quoted.push(format!("{} more", names.len() - MOST_NAMES));
    }
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => "none".to_owned(),
    }
}
