//! Child processes, as far as the operating systems differ.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

/// Makes a command start in a process group of its own.
pub(crate) fn in_new_group(command: &mut Command) -> &mut Command {
    command.process_group(0)
}

/// Returns the signal that ended a process, if one did.
pub(crate) fn signal(status: ExitStatus) -> Option<i32> {
    status.signal()
}

/// Returns an argument with these bytes.
pub(crate) fn argument(bytes: Vec<u8>) -> OsString {
    OsString::from_vec(bytes)
}
