//! Remedies for errors of the operating system.

use std::io;

/// Number of the error that the system has too many open files, on all Unix systems.
const OPEN_IN_SYSTEM: i32 = 23;

/// Number of the error that the process has too many open files, on all Unix systems.
const OPEN_IN_PROCESS: i32 = 24;

/// Number of the error that a device fails, on all Unix systems.
const DEVICE_FAILS: i32 = 5;

/// Number of the error that a device or file system lacks an operation, on all Unix systems.
const NO_SUCH_DEVICE: i32 = 19;

/// Returns the remedy for the most common errors of the operating system.
pub(crate) fn remedy(action: &str, source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(OPEN_IN_SYSTEM) => return ": close other programs, or raise the limit of the system (`fs.file-max`)",
        Some(OPEN_IN_PROCESS) => {
            return ": the limit on open files is reached: raise it (`ulimit -n`), or ask for fewer files at a time";
        }
        Some(NO_SUCH_DEVICE) if action == "map" => {
            return ": this file system cannot map files: copy them to another one";
        }
        Some(DEVICE_FAILS) if action != "lock" => return ": the disk or its connection fails: see the system's log",
        _ => {}
    }
    match source.kind() {
        // The lock file could be opened, so its permissions are not the reason.
        _ if action == "lock" => {
            ": if this file system does not support locks, two trainings could write one run: \
             put the run on another one, or mount this one with locks"
        }
        io::ErrorKind::WouldBlock if action.starts_with("start") => {
            ": the limit on processes and threads (`ulimit -u`) or on memory (`ulimit -v`) is reached: raise it, or \
             start fewer (RAYON_NUM_THREADS)"
        }
        io::ErrorKind::OutOfMemory => {
            ": the memory, or a limit on it (`ulimit -v`, `vm.max_map_count`), is used up: free some or raise the limit"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ": free some space or choose another disk; what was there before is untouched"
        }
        io::ErrorKind::FileTooLarge => {
            ": the limit on the length of files is reached: raise it (`ulimit -f`), or store in shards"
        }
        io::ErrorKind::PermissionDenied => ": check the permissions of the file and its directory",
        io::ErrorKind::ReadOnlyFilesystem => ": the disk is mounted read-only",
        io::ErrorKind::NotFound => ": check the path",
        io::ErrorKind::Unsupported => ": this file system cannot do that: put the run on another one",
        _ => "",
    }
}
