//! What must hold of any input whatever, for the fuzz targets (`fuzz/`) and for `tests/corpus.rs`: each `check` panics where it
//! does not.

#![allow(dead_code, reason = "each user takes some of these")]

pub mod checkpoint;
pub mod density;
pub mod header;
pub mod lists;
pub mod metadata;

use std::path::Path;

/// A directory in memory, where there is such a place: inputs come by the thousand a second.
pub fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// An error is one clear line or more, which tells of the file.
pub fn check_error(error: &posthoc_ema::Error, path: &Path) {
    let text = error.to_string();
    assert!(text.contains(path.to_str().unwrap()), "no word of the file: {text}");
    assert!(text.len() < 20_000, "{} bytes of an error", text.len());
    let hidden = text.chars().find(|c| c.is_control() && *c != '\n');
    assert_eq!(hidden, None, "a control character would reach the terminal: {text:?}");
}
