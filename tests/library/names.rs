//! Names of types, which are unique within each crate.

use std::collections::BTreeMap;

use crate::sources::sources;

/// Names that clap's derives have by convention.
const SHARED: &[&str] = &["Arguments"];

#[test]
fn no_two_types_of_a_crate_share_a_name() {
    for folder in ["src", "cli/src", "candle/src", "python/src"] {
        let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for source in sources(folder) {
            for name in source.code.lines().filter_map(type_name) {
                found.entry(name.to_owned()).or_default().push(source.path.clone());
            }
        }
        found.retain(|name, files| files.len() > 1 && !SHARED.contains(&name.as_str()));
        assert!(found.is_empty(), "{folder} defines types of the same name: {found:?}");
    }
}

/// Returns the name of the type or trait that a line defines.
fn type_name(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let line = match line.strip_prefix("pub") {
        Some(rest) => {
            rest.trim_start().strip_prefix('(').map_or(rest, |rest| rest.split_once(')').unwrap_or_default().1)
        }
        None => line,
    };
    let (keyword, rest) = line.trim_start().split_once(' ')?;
    if !["struct", "enum", "trait", "union"].contains(&keyword) {
        return None;
    }
    rest.split(|letter: char| !letter.is_alphanumeric() && letter != '_').find(|name| !name.is_empty())
}
