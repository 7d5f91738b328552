//! Differences between two configurations.

use serde_json::{Map, Value};

/// Setting in which two configurations differ. A value that is missing is null.
pub(super) struct SettingDifference<'a> {
    /// Keys that lead to it, joined by dots.
    pub key: String,
    pub value: &'a Value,
    pub other: &'a Value,
}

/// Returns the first setting in which two configurations differ, of those for which `counts` is true.
///
/// `counts` gets the keys that lead to a setting, joined by dots, and true if both have it. Off, empty and null equal
/// absent, and 16 equals 16.0.
pub(super) fn difference<'a>(
    config: &'a Value,
    other: &'a Value,
    counts: &dyn Fn(&str, bool) -> bool,
) -> Option<SettingDifference<'a>> {
    compare("", config, other, counts)
}

fn compare<'a>(
    key: &str,
    value: &'a Value,
    other: &'a Value,
    counts: &dyn Fn(&str, bool) -> bool,
) -> Option<SettingDifference<'a>> {
    let (entries, others) = match (value, other) {
        (Value::Object(entries), Value::Object(others))
            if key.is_empty() || !(entries.is_empty() || others.is_empty()) =>
        {
            (entries, others)
        }
        _ => {
            let differs = normalize(value) != normalize(other);
            return differs.then(|| SettingDifference { key: key.to_owned(), value, other });
        }
    };
    let mut keys: Vec<&String> =
        entries.keys().chain(others.keys().filter(|key| !entries.contains_key(*key))).collect();
    keys.sort();
    for inner in keys {
        let path = if key.is_empty() { inner.clone() } else { format!("{key}.{inner}") };
        if counts(&path, entries.contains_key(inner) && others.contains_key(inner))
            && let Some(found) = compare(&path, of(entries, inner), of(others, inner), counts)
        {
            return Some(found);
        }
    }
    None
}

fn of<'a>(entries: &'a Map<String, Value>, key: &str) -> &'a Value {
    entries.get(key).unwrap_or(&Value::Null)
}

/// Normalizes a setting for comparison: off or empty equals absent, and 16 equals 16.0.
pub(super) fn normalize(value: &Value) -> Value {
    match value {
        Value::Bool(false) => Value::Null,
        Value::Object(entries) if entries.is_empty() => Value::Null,
        Value::Array(items) if items.is_empty() => Value::Null,
        Value::Object(entries) => entries.iter().map(|(key, value)| (key.clone(), normalize(value))).collect(),
        Value::Array(items) => items.iter().map(normalize).collect(),
        Value::Number(number) => number.as_f64().map_or(value.clone(), Value::from),
        _ => value.clone(),
    }
}
