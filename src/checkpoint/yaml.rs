//! Settings in YAML files. `saphyr-parser` reads the syntax; tags of Python's classes are kept as text or dropped.

use std::collections::HashMap;
use std::path::Path;

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::fs::find_document;

/// Most values within each other.
const MAX_HEIGHT: usize = 128;

/// Most values and bytes of text, those of aliases counted each time. An alias is a copy of its value.
const MAX_SIZE: usize = 4 << 20;

/// Key whose maps are merged into the map around it.
const MERGE: &str = "<<";

/// Reads the first document of a file; `None` if the file does not exist.
///
/// # Errors
/// As [`find_document`], and [`Error::Damaged`] for a file that is not YAML, or that is too large with its aliases.
pub(super) fn read(path: &Path) -> Result<Option<Value>> {
    let Some(bytes) = find_document(path)? else { return Ok(None) };
    parse(&String::from_utf8_lossy(&bytes)).map(Some).map_err(|why| Error::damaged(path, why))
}

fn parse(text: &str) -> Result<Value, String> {
    let mut reader = YamlReader::default();
    for event in Parser::new_from_str(text.trim_start_matches('\u{feff}')) {
        let (event, _) = event.map_err(|error| error.to_string())?;
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(&text, style, tag.as_deref());
                reader.add(YamlValue { value, size: 1 + text.len(), height: 1 }, anchor)?;
            }
            Event::Alias(anchor) => reader.add_alias(anchor)?,
            Event::SequenceStart(anchor, _) => reader.open(OpenContent::List(Vec::new()), anchor)?,
            Event::MappingStart(anchor, _) => reader.open(OpenContent::Map(Map::new(), None), anchor)?,
            Event::SequenceEnd | Event::MappingEnd => reader.close()?,
            Event::DocumentEnd => break,
            _ => {}
        }
    }
    Ok(reader.root.unwrap_or_default())
}

/// Value with its size and the number of values within each other.
#[derive(Clone)]
struct YamlValue {
    value: Value,
    size: usize,
    height: usize,
}

/// List or map up to the value that is read next. A map has the key of this value, once it was read.
enum OpenContent {
    List(Vec<Value>),
    Map(Map<String, Value>, Option<String>),
}

/// List or map whose end was not read yet.
struct OpenCollection {
    content: OpenContent,
    anchor: usize,
    size: usize,
    height: usize,
}

#[derive(Default)]
struct YamlReader {
    open: Vec<OpenCollection>,
    /// Values that aliases refer to.
    anchors: HashMap<usize, YamlValue>,
    root: Option<Value>,
    /// Size of all values so far.
    size: usize,
}

impl YamlReader {
    fn open(&mut self, content: OpenContent, anchor: usize) -> Result<(), String> {
        if self.open.len() >= MAX_HEIGHT {
            return Err(too_high());
        }
        self.open.push(OpenCollection { content, anchor, size: 1, height: 0 });
        self.grow(1)
    }

    fn close(&mut self) -> Result<(), String> {
        let Some(OpenCollection { content, anchor, size, height }) = self.open.pop() else { return Ok(()) };
        let value = match content {
            OpenContent::List(items) => Value::Array(items),
            OpenContent::Map(entries, _) => Value::Object(entries),
        };
        self.put(YamlValue { value, size, height: height + 1 }, anchor)
    }

    fn add(&mut self, value: YamlValue, anchor: usize) -> Result<(), String> {
        self.grow(value.size)?;
        self.put(value, anchor)
    }

    fn add_alias(&mut self, anchor: usize) -> Result<(), String> {
        // A value that contains itself has no anchor yet.
        let Some(size) = self.anchors.get(&anchor).map(|value| value.size) else {
            return self.add(YamlValue { value: Value::Null, size: 1, height: 1 }, 0);
        };
        self.grow(size)?;
        let value = self.anchors[&anchor].clone();
        self.put(value, 0)
    }

    fn grow(&mut self, size: usize) -> Result<(), String> {
        self.size = self.size.saturating_add(size);
        match self.size > MAX_SIZE {
            true => Err(format!("with its aliases it has more than {MAX_SIZE} values and letters")),
            false => Ok(()),
        }
    }

    /// Puts a value into the list or map around it.
    fn put(&mut self, new: YamlValue, anchor: usize) -> Result<(), String> {
        if anchor > 0 {
            self.grow(new.size)?;
            self.anchors.insert(anchor, new.clone());
        }
        let depth = self.open.len();
        let Some(outer) = self.open.last_mut() else {
            self.root = Some(new.value);
            return Ok(());
        };
        outer.size += new.size;
        outer.height = outer.height.max(new.height);
        if depth + new.height > MAX_HEIGHT {
            return Err(too_high());
        }
        match &mut outer.content {
            OpenContent::List(items) => items.push(new.value),
            OpenContent::Map(_, key @ None) => *key = Some(key_text(new.value)),
            OpenContent::Map(entries, key) => insert(entries, key.take().unwrap_or_default(), new.value),
        }
        Ok(())
    }
}

fn too_high() -> String {
    format!("more than {MAX_HEIGHT} values are within each other")
}

fn key_text(value: Value) -> String {
    match value {
        Value::String(text) => text,
        value => value.to_string(),
    }
}

/// Adds an entry to a map. The map of a merge adds the entries that there are not yet.
fn insert(entries: &mut Map<String, Value>, key: String, value: Value) {
    match value {
        Value::Object(merged) if key == MERGE => {
            for (key, value) in merged {
                entries.entry(key).or_insert(value);
            }
        }
        value => drop(entries.insert(key, value)),
    }
}

/// Reads a scalar. A tag that is not one of YAML's own, such as that of a function, is part of the text.
fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    match tag {
        Some(tag) if !tag.is_yaml_core_schema() => return format!("{tag} {text}").trim_end().into(),
        Some(tag) if tag.suffix.starts_with("python/") => return format!("!!{} {text}", tag.suffix).trim_end().into(),
        _ => {}
    }
    if style != ScalarStyle::Plain || tag.is_some_and(|tag| tag.suffix == "str") {
        return text.into();
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => match text.parse::<f64>().ok().filter(|number| number.is_finite()) {
            Some(number) => Value::from(number),
            None => text.into(),
        },
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
                    scales:\n- 1\n- 0.5\nargs: !!python/object:x.Y\n  lr: 0.1\n\"quoted\": \"x # y\"\n";
        let expected = json!({
            "name": "pythia-14m", "hf_config": {"org": "EleutherAI", "name": "a: b"}, "norm_eps": 1e-5, "bias": true,
            "rope_base": 10000.0, "intermediate_size": null, "scales": [1.0, 0.5], "args": {"lr": 0.1},
            "quoted": "x # y",
        });
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn all_of_the_syntax_is_read() {
        for (text, expected) in [
            (
                "a: &x {b: 1, c: [2, 3]}\nd: *x",
                json!({"a": {"b": 1.0, "c": [2.0, 3.0]}, "d": {"b": 1.0, "c": [2.0, 3.0]}}),
            ),
            (
                "base: &x {a: 1, b: 2}\nown: {b: 3, <<: *x}",
                json!({"base": {"a": 1.0, "b": 2.0}, "own": {"a": 1.0, "b": 3.0}}),
            ),
            ("a: |\n  one\n  two\nb: >-\n  one\n  two", json!({"a": "one\ntwo\n", "b": "one two"})),
            ("a: \"x\\n\\u00e9\"\nb: 'it''s'\nc: one\n  two", json!({"a": "x\né", "b": "it's", "c": "one two"})),
            ("a: '1'\nb: !!str 2\nc: .inf\nd: \"true\"", json!({"a": "1", "b": "2", "c": ".inf", "d": "true"})),
            ("a:\n - b\n -\n   c: d\n- e: 1", json!(null)),
            ("act: !!python/name:torch.nn.GELU ''", json!({"act": "!!python/name:torch.nn.GELU"})),
            ("sizes: !!python/tuple\n- 1\n- 2", json!({"sizes": [1.0, 2.0]})),
            ("1: a\n[2, 3]: b\nnull: c", json!({"1.0": "a", "[2.0,3.0]": "b", "null": "c"})),
            ("a: 1\na: 2\n---\na: 3", json!({"a": 2.0})),
            ("a: &x [*x]", json!({"a": [null]})),
            ("\u{feff}x: 1", json!({"x": 1.0})),
            ("", json!(null)),
            ("- - a", json!([["a"]])),
            ("{a: 1}", json!({"a": 1.0})),
        ] {
            assert_eq!(parse(text).unwrap_or_default(), expected, "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused_without_a_panic() {
        for text in ["a: b: c\n  d: e", "a: *x", "a: [1", "\"", "a: &x", "%", "\t", "- a\nb: 1", "a: {b: 1]"] {
            let _ = parse(text);
        }
        for text in ["a: b: c", "a: *x", "a: [1", "a: \"", "a: {b: 1]"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    /// Each line holds the one before nine times, and so the last would hold the first a billion times.
    #[test]
    fn expansion_of_aliases_is_bounded() {
        let mut bomb = String::from("a0: &a0 lol\n");
        let mut chain = bomb.clone();
        for i in 1..1000 {
            let inner = format!("*a{}", i - 1);
            bomb += &format!("a{i}: &a{i} [{}]\n", [inner.as_str(); 9].join(", "));
            chain += &format!("a{i}: &a{i} [{}]\n", inner);
        }
        let fault = |text: &str| parse(text).unwrap_err();
        assert!(fault(&bomb).contains("with its aliases it has more than 4194304 values"), "{}", fault(&bomb));
        for text in [chain, "[".repeat(100_000), "- ".repeat(100_000), "{a: ".repeat(100_000)] {
            let why = fault(&text);
            assert!(why.contains("more than 128 values") || why.contains("recursion limit"), "{why}");
        }
        assert!(fault(&format!("a: '{}'", "x".repeat(MAX_SIZE))).contains("with its aliases it has more than"));
    }
}
