//! Settings in YAML files, as far as trainers write them: maps of scalars and lists. All else is compared as text.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::fs::find_document;

/// Reads a file; `None` if it does not exist.
///
/// # Errors
/// As [`find_document`].
pub(super) fn read(path: &Path) -> Result<Option<Value>> {
    Ok(find_document(path)?.map(|bytes| parse(&String::from_utf8_lossy(&bytes))))
}

fn parse(text: &str) -> Value {
    let mut root = Value::Object(Map::new());
    // Keys that lead to the current line, each with the indentation of its own line.
    let mut keys: Vec<(usize, String)> = Vec::new();
    for line in text.lines().filter(|line| is_setting(line)) {
        let content = line.trim_start();
        let indent = line.len() - content.len();
        if let Some(item) = content.strip_prefix("- ").or((content == "-").then_some("")) {
            keys.retain(|(other, _)| *other <= indent);
            append(&mut root, &keys, scalar(item));
            continue;
        }
        let Some((key, value)) = split(content) else { continue };
        keys.retain(|(other, _)| *other < indent);
        keys.push((indent, key));
        // A tag of a Python class is before the map of its members.
        if !(value.is_empty() || value.starts_with('!') && !value.contains(' ')) {
            insert(&mut root, &keys, scalar(&value));
        } else {
            insert(&mut root, &keys, Value::Null);
        }
    }
    root
}

/// Returns false for lines without a setting: comments, and marks of a document.
fn is_setting(line: &str) -> bool {
    let content = line.trim();
    !(content.is_empty() || content.starts_with('#') || content == "---" || content == "...")
}

/// Splits a line into key and value, without quotes and comment.
fn split(content: &str) -> Option<(String, String)> {
    let (key, value) = content.split_once(": ").or_else(|| content.strip_suffix(':').map(|key| (key, "")))?;
    let value = if value.starts_with(['"', '\'']) { value } else { value.split(" #").next().unwrap_or(value) };
    Some((unquoted(key.trim()).to_owned(), value.trim().to_owned()))
}

fn unquoted(text: &str) -> &str {
    let inner = |quote: char| text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    inner('"').or_else(|| inner('\'')).unwrap_or(text)
}

fn scalar(text: &str) -> Value {
    let text = text.trim();
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => match text.parse::<f64>().ok().filter(|number| number.is_finite()) {
            Some(number) => Value::from(number),
            None => unquoted(text).into(),
        },
    }
}

/// Returns the place that some keys lead to.
fn place<'a>(mut at: &'a mut Value, keys: &[(usize, String)]) -> &'a mut Value {
    for (_, key) in keys {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        at = &mut at[key.as_str()];
    }
    at
}

fn insert(root: &mut Value, keys: &[(usize, String)], value: Value) {
    *place(root, keys) = value;
}

fn append(root: &mut Value, keys: &[(usize, String)], item: Value) {
    let place = place(root, keys);
    match place {
        Value::Array(items) => items.push(item),
        _ if keys.is_empty() => {}
        _ => *place = Value::Array(vec![item]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn maps_scalars_and_lists_are_read() {
        let text = "# litgpt\n---\nname: pythia-14m\nhf_config:\n  org: EleutherAI\n  name: 'a: b'\n\
                    norm_eps: 1e-05 # small\nbias: true\nrope_base: 10000\nintermediate_size: null\n\
                    scales:\n- 1\n- 0.5\nargs: !!python/object:x.Y\n  lr: 0.1\n\"quoted\": \"x # y\"\nodd\n";
        let expected = json!({
            "name": "pythia-14m", "hf_config": {"org": "EleutherAI", "name": "a: b"}, "norm_eps": 1e-5, "bias": true,
            "rope_base": 10000.0, "intermediate_size": null, "scales": [1.0, 0.5], "args": {"lr": 0.1},
            "quoted": "x # y",
        });
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn any_text_is_read_without_a_panic() {
        for text in ["", "-", "- - a", "a:\n - b\n   c: d\n- e", ":", "a: b: c\n  d: e", "\u{feff}x: 1", "{a: 1}"] {
            assert!(parse(text).is_object(), "{text}");
        }
    }
}
