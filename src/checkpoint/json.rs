//! JSON as Python writes it: with `NaN`, `Infinity` and `-Infinity`.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::fs::find_document;

/// Reads a file; `None` if it does not exist. Numbers that are not finite become null.
///
/// # Errors
/// As [`find_document`], and [`Error::Damaged`] for a file that is not JSON.
pub(crate) fn read(path: &Path) -> Result<Option<Value>> {
    let Some(bytes) = find_document(path)? else { return Ok(None) };
    parse(&bytes).map(Some).map_err(|error| Error::damaged(path, error))
}

fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    let mut strict = Vec::with_capacity(bytes.len());
    let mut at = 0;
    for string in strings(bytes) {
        strict.extend(replace_literals(&bytes[at..string.start]));
        strict.extend_from_slice(&bytes[string.clone()]);
        at = string.end;
    }
    strict.extend(replace_literals(&bytes[at..]));
    serde_json::from_slice(&strict)
}

/// Replaces the numbers that JSON does not have by null, in the text between strings.
fn replace_literals(text: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    text.replace("-Infinity", "null").replace("Infinity", "null").replace("NaN", "null").into_bytes()
}

/// Finds the ranges of all strings, with their quotes.
pub(super) fn strings(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = bytes[at..].iter().position(|&byte| byte == b'"').map(|i| at + i) {
        let mut end = start + 1;
        while end < bytes.len() && bytes[end] != b'"' {
            end += if bytes[end] == b'\\' { 2 } else { 1 };
        }
        at = (end + 1).min(bytes.len());
        found.push(start..at);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn literals_of_python_become_null() {
        let text = r#"{"a": [NaN, -Infinity, Infinity, 1], "NaN\"": "-Infinity \\", "é": "\"NaN"}"#;
        let expected = json!({"a": [null, null, null, 1], "NaN\"": "-Infinity \\", "é": "\"NaN"});
        assert_eq!(parse(text.as_bytes()).unwrap(), expected);
        for cut in 1..text.len() {
            assert!(parse(&text.as_bytes()[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn missing_file_is_none_and_damaged_file_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        assert_eq!(read(&path).unwrap(), None);
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(read(&path), Err(Error::Damaged { .. })));
    }
}
