//! Properties of any input, for the fuzz targets (`fuzz/`) and the replay of their corpora.
//!
//! Each `check` panics if one is violated.

#![allow(dead_code, reason = "each fuzz target uses one of these")]

pub mod checkpoint;
pub mod density;
pub mod header;
pub mod lists;
pub mod metadata;
pub mod weights;

use std::path::Path;

/// Returns a temporary directory, in memory if possible: a fuzzer tries thousands of inputs a second.
pub fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// Checks that an error names the file, is short, and has no control characters.
pub fn check_error(error: &posthoc_ema::Error, path: &Path) {
    let text = error.to_string();
    assert!(text.contains(path.to_str().unwrap()), "the error does not name the file: {text}");
    assert!(text.len() < 20_000, "{} bytes of an error", text.len());
    let hidden = text.chars().find(|c| c.is_control() && *c != '\n');
    assert_eq!(hidden, None, "a control character would reach the terminal: {text:?}");
}
