//! JSON as Python's tools write it: with `NaN`, `Infinity` and `-Infinity`.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::fs::find_document;

/// Reads a file; none where there is none. What is no number in JSON is null.
///
/// # Errors
/// As [`find_document`], and [`Error::Damaged`] for what is no JSON.
pub(super) fn read(path: &Path) -> Result<Option<Value>> {
    let parse = |bytes: Vec<u8>| parse(&bytes).map_err(|error| Error::damaged(path, error));
    find_document(path)?.map(parse).transpose()
}

fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    let (mut strict, mut at) = (Vec::with_capacity(bytes.len()), 0);
    for string in strings(bytes).into_iter().chain(std::iter::once(bytes.len()..bytes.len())) {
        strict.extend(without_literals(&bytes[at..string.start]));
        strict.extend_from_slice(&bytes[string.clone()]);
        at = string.end;
    }
    serde_json::from_slice(&strict)
}

/// Text between strings, with null for numbers that JSON does not know.
fn without_literals(text: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    ["-Infinity", "Infinity", "NaN"].iter().fold(text.into_owned(), |text, own| text.replace(own, "null")).into_bytes()
}

/// Where the strings are, with their quotes.
pub(super) fn strings(bytes: &[u8]) -> Vec<Range<usize>> {
    let (mut found, mut at) = (Vec::new(), 0);
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
    fn what_python_writes_is_read() {
        let text = r#"{"a": [NaN, -Infinity, Infinity, 1], "NaN\"": "-Infinity \\", "é": "\"NaN"}"#;
        let expected = json!({"a": [null, null, null, 1], "NaN\"": "-Infinity \\", "é": "\"NaN"});
        assert_eq!(parse(text.as_bytes()).unwrap(), expected);
        for cut in 1..text.len() {
            assert!(parse(&text.as_bytes()[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_none_and_a_damaged_one_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        assert_eq!(read(&path).unwrap(), None);
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(read(&path), Err(Error::Damaged { .. })));
    }
}
