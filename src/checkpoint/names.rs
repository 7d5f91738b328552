//! Names of files, for messages and comparisons.

use std::path::Path;

/// Returns the last component of a path; bytes that are not UTF-8 are replaced.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Returns true for a file that timm saves within an epoch, to go on after a crash: `recovery-3-500`, with the numbers
/// of epoch and batch.
pub(super) fn is_recovery(path: &Path) -> bool {
    let name = file_name(path);
    let numbers = name.strip_prefix("recovery-").and_then(|rest| rest.split('.').next()?.split_once('-'));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers.is_some_and(|(epoch, batch)| is_number(epoch) && is_number(batch))
}
