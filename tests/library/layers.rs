//! Layers of the architecture: the folders that each folder may use, and no two files that import each other.

use std::collections::{BTreeMap, BTreeSet};

use crate::sources::{Source, Uses, sources};

/// Folders and files at the top of `src` with those that each may use, lowest layer first. Every folder must be listed.
const MAY_USE: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("device", &[]),
    ("tensor", &["error"]),
    ("fs", &["error"]),
    ("math", &["error"]),
    ("compute", &["error", "tensor", "device", "fs"]),
    ("snapshot", &["error", "tensor", "fs"]),
    ("pytorch", &["error", "tensor", "fs"]),
    ("planning", &["error", "tensor", "fs", "math", "compute", "snapshot"]),
    ("synthesis", &["error", "tensor", "device", "fs", "compute", "snapshot", "planning"]),
    ("checkpoint", &["error", "tensor", "fs", "snapshot", "pytorch", "synthesis"]),
    ("output", &["error", "tensor", "device", "fs", "snapshot", "synthesis", "checkpoint"]),
    ("run", &["error", "tensor", "device", "fs", "math", "compute", "snapshot", "planning", "synthesis", "output"]),
    ("tracker", &["error", "tensor", "device", "fs", "math", "compute", "snapshot", "planning", "synthesis", "run"]),
    ("sweep", &["error", "tensor", "device", "fs", "math", "snapshot", "planning", "synthesis", "output", "run"]),
    (
        "merge",
        &["error", "tensor", "device", "fs", "math", "snapshot", "planning", "synthesis", "checkpoint", "output"],
    ),
    ("import", &["error", "tensor", "fs", "math", "snapshot", "pytorch", "planning", "checkpoint", "run"]),
];

/// Source folders of the crates.
const CRATES: &[&str] = &["src", "cli/src", "candle/src", "python/src"];

#[test]
fn each_folder_uses_only_what_its_layer_allows() {
    let sources = sources("src");
    let uses = Uses::new(&sources);
    for source in &sources {
        let Some(own) = source.module.first() else { continue };
        let Some((_, allowed)) = MAY_USE.iter().find(|(folder, _)| folder == own) else {
            panic!("{}: add `{own}` to the table, and to ARCHITECTURE.md", source.path);
        };
        for used in uses.of(source).iter().filter_map(|module| module.first()) {
            assert!(used == own || allowed.contains(&used.as_str()), "{} uses `{used}`", source.path);
        }
    }
}

#[test]
fn no_two_files_import_each_other() {
    let circles: Vec<String> = CRATES.iter().flat_map(|folder| circles(&sources(folder))).collect();
    assert!(circles.is_empty(), "files that import each other:\n{}", circles.join("\n"));
}

/// Returns the groups of files that import each other, directly or through others.
fn circles(sources: &[Source]) -> Vec<String> {
    let uses = Uses::new(sources);
    let edges: BTreeMap<&[String], BTreeSet<Vec<String>>> =
        sources.iter().map(|source| (source.module.as_slice(), uses.of(source))).collect();
    let reached: BTreeMap<&[String], BTreeSet<Vec<String>>> =
        edges.keys().map(|&module| (module, reachable(&edges, module))).collect();
    let mut groups: BTreeSet<Vec<&str>> = BTreeSet::new();
    for (&module, reachable) in &reached {
        if reachable.contains(module) {
            let group = reachable.iter().filter(|&other| reached[other.as_slice()].contains(module));
            groups.insert(group.map(|other| uses.path(other)).collect());
        }
    }
    groups.into_iter().map(|group| group.join(", ")).collect()
}

/// Returns every module that one imports, directly or through others.
fn reachable(edges: &BTreeMap<&[String], BTreeSet<Vec<String>>>, from: &[String]) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    let mut pending: Vec<&Vec<String>> = edges[from].iter().collect();
    while let Some(module) = pending.pop() {
        if found.insert(module.clone()) {
            pending.extend(&edges[module.as_slice()]);
        }
    }
    found
}

/// Checks that a word occurs in the code of the allowed files only.
fn assert_only_in(crates: &[&str], word: &str, allowed: &[&str]) {
    for source in crates.iter().flat_map(|folder| sources(folder)) {
        let found = source.code.split(|letter: char| !letter.is_alphanumeric() && letter != '_').any(|w| w == word);
        let is_allowed = allowed.iter().any(|prefix| source.path.starts_with(prefix));
        assert!(is_allowed || !found, "{}: `{word}` belongs to {}", source.path, allowed.join(", "));
    }
}

#[test]
fn only_fs_names_the_operating_system() {
    for word in ["rustix", "nix", "libc", "unix"] {
        assert_only_in(&["src"], word, &["src/fs/"]);
    }
}

#[test]
fn mathematics_names_no_files() {
    for source in sources("src").iter().filter(|source| source.path.starts_with("src/math/")) {
        for word in ["std::fs", "std::path"] {
            assert!(!source.code.contains(word), "{}: `{word}`", source.path);
        }
    }
}

#[test]
fn commands_do_not_use_the_arithmetic() {
    for source in sources("cli/src").iter().filter(|source| source.path.starts_with("cli/src/commands/")) {
        assert!(!source.code.contains("posthoc_ema::compute"), "{} uses `posthoc_ema::compute`", source.path);
    }
}

#[test]
fn only_compute_and_the_mapping_hold_unsafe_code() {
    assert_only_in(&["src"], "unsafe", &["src/compute/", "src/fs/mapping"]);
    assert_only_in(&["cli/src"], "unsafe", &[]);
    assert_only_in(&["candle/src"], "unsafe", &["candle/src/cuda.rs"]);
    assert_only_in(&["python/src"], "unsafe", &["python/src/lend.rs"]);
}

#[test]
fn foreign_libraries_are_named_in_one_place_each() {
    // Candle's storages hold slices and streams of cudarc.
    assert_only_in(CRATES, "cudarc", &["src/compute/cuda/", "candle/src/cuda.rs"]);
    assert_only_in(CRATES, "plotters", &["cli/src/pictures/canvas.rs"]);
    assert_only_in(CRATES, "resvg", &["cli/src/pictures/file.rs"]);
}
