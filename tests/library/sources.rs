//! Parser of the workspace's Rust sources for the tests of its architecture.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// One file of a crate.
pub struct Source {
    /// Path from the top of the repository.
    pub path: String,
    /// Module path of the file, such as `["synthesis", "swap"]`; empty for the crate's root.
    pub module: Vec<String>,
    /// Text without comments and inline tests.
    pub code: String,
}

/// Reads every Rust file below a folder such as `src`, except files of tests.
pub fn sources(folder: &str) -> Vec<Source> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = top.join(folder);
    let mut paths = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                paths.push(path);
            }
        }
    }
    paths.sort();
    let sources: Vec<Source> = paths.iter().filter_map(|path| source(top, &root, path)).collect();
    assert!(!sources.is_empty(), "{folder} contains no Rust file");
    sources
}

fn source(top: &Path, root: &Path, path: &PathBuf) -> Option<Source> {
    let mut module: Vec<String> = path
        .strip_prefix(root)
        .unwrap()
        .with_extension("")
        .components()
        .map(|part| part.as_os_str().to_str().unwrap().to_owned())
        .collect();
    if module.iter().any(|part| part == "tests") {
        return None;
    }
    if module.last().is_some_and(|name| ["mod", "lib", "main"].contains(&name.as_str())) {
        module.pop();
    }
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = code.lines().map(|line| line.split("//").next().unwrap_or_default());
    let code = lines.collect::<Vec<_>>().join("\n");
    Some(Source { path: path.strip_prefix(top).unwrap().to_str().unwrap().to_owned(), module, code })
}

/// Modules of a crate, to find those that each file uses.
pub struct Uses {
    modules: BTreeMap<Vec<String>, String>,
    /// Names that each module re-exports, with their original paths.
    exports: BTreeMap<Vec<String>, BTreeMap<String, Vec<String>>>,
}

impl Uses {
    /// Finds the modules and re-exports of a crate.
    pub fn new(sources: &[Source]) -> Uses {
        let modules = sources.iter().map(|source| (source.module.clone(), source.path.clone())).collect();
        let mut uses = Uses { modules, exports: BTreeMap::new() };
        for source in sources {
            let exported: BTreeMap<String, Vec<String>> = imports(&source.code)
                .into_iter()
                .filter(|(exported, _)| *exported)
                .filter_map(|(_, path)| uses.absolute(&source.module, &path))
                .filter_map(|path| Some((path.last()?.clone(), path)))
                .collect();
            uses.exports.insert(source.module.clone(), exported);
        }
        uses
    }

    /// Returns the modules that a file uses, also by re-exports, without its own ancestors and descendants.
    pub fn of(&self, source: &Source) -> BTreeSet<Vec<String>> {
        let own = &source.module;
        let paths = imports(&source.code).into_iter().map(|(_, path)| path).chain(inline_paths(&source.code));
        paths
            .filter_map(|path| self.absolute(own, &path))
            .filter_map(|path| self.resolve(&path, 0))
            .filter(|module| !module.starts_with(own) && !own.starts_with(module))
            .collect()
    }

    /// Returns the file of a module.
    pub fn path(&self, module: &[String]) -> &str {
        &self.modules[module]
    }

    /// Returns the path from the crate's root of one that begins with `crate`, `self`, `super` or a child module.
    fn absolute(&self, module: &[String], path: &[String]) -> Option<Vec<String>> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" => Some(rest.to_vec()),
            "self" => Some([module, rest].concat()),
            "super" => {
                let ups = path.iter().take_while(|part| *part == "super").count();
                Some([&module[..module.len().checked_sub(ups)?], &path[ups..]].concat())
            }
            child => {
                let own = [module, &[child.to_owned()]].concat();
                self.modules.contains_key(&own).then(|| [module, path].concat())
            }
        }
    }

    /// Returns the module that a path from the root is in, after all re-exports.
    fn resolve(&self, path: &[String], depth: usize) -> Option<Vec<String>> {
        let length = (0..=path.len()).rev().find(|&n| self.modules.contains_key(&path[..n]))?;
        let (module, rest) = path.split_at(length);
        let exported = rest.first().and_then(|name| self.exports.get(module)?.get(name));
        match exported {
            Some(target) if depth < 8 => self.resolve(&[target, &rest[1..]].concat(), depth + 1),
            _ => Some(module.to_vec()),
        }
    }
}

/// Returns the paths of a file's `use` items, each with true if it is exported.
fn imports(code: &str) -> Vec<(bool, Vec<String>)> {
    let mut found = Vec::new();
    for item in code.split(';') {
        let Some(at) = item.rfind("use ") else { continue };
        let before = item[..at].lines().last().unwrap_or_default().trim();
        if before.is_empty() || before.starts_with("pub") {
            flatten(&[], &item[at + 4..], before.starts_with("pub"), &mut found);
        }
    }
    found
}

/// Adds the paths of one `use` tree.
fn flatten(prefix: &[String], tree: &str, exported: bool, found: &mut Vec<(bool, Vec<String>)>) {
    let parts = |path: &str| -> Vec<String> {
        let path = path.split(" as ").next().unwrap_or_default();
        path.split("::").map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
    };
    let Some((head, body)) = tree.split_once('{') else {
        let path: Vec<String> = prefix.iter().cloned().chain(parts(tree)).collect();
        // `a::{self}` stands for `a`.
        let path = if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
            path[..path.len() - 1].to_vec()
        } else {
            path
        };
        found.push((exported, path));
        return;
    };
    let prefix: Vec<String> = prefix.iter().cloned().chain(parts(head)).collect();
    let body = body.rsplit_once('}').map_or(body, |(body, _)| body);
    let (mut depth, mut start) = (0, 0);
    for (at, letter) in body.char_indices().chain([(body.len(), ',')]) {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let item = body[start..at].trim();
                if !item.is_empty() {
                    flatten(&prefix, item, exported, found);
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// Returns the paths within the code that begin with `crate::` or `super::`.
fn inline_paths(code: &str) -> Vec<Vec<String>> {
    let word = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == ':';
    let words = code.split(|letter| !word(letter));
    let paths = words.filter(|word| word.starts_with("crate::") || word.starts_with("super::"));
    paths.map(|path| path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect()).collect()
}
