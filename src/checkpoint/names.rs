//! Names of files, for messages and comparisons.

use std::path::Path;

/// Returns the last component of a path; bytes that are not UTF-8 are replaced.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
