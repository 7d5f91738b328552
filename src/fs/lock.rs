//! The lock that a run holds while it is being written.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use super::fail_point;
use crate::error::{Error, Result};

/// The name of the lock within a run. It stays behind, unlocked: removing it would race with the next writer.
const LOCK_FILE: &str = ".lock";

/// Held as long as this lives; the system releases it even when the process is killed.
#[derive(Debug)]
pub struct Lock {
    file: File,
    /// Who took it: a forked child shares the open file, and must not release what its parent holds.
    process: u32,
}

/// Closing the file would not do while a forked child, such as a process that loads data, has it open too.
impl Drop for Lock {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            // Closed in a moment, and released then where this fails.
            let _ = self.file.unlock();
        }
    }
}

impl Lock {
    /// Locks a run for writing.
    ///
    /// # Errors
    /// [`Error::Locked`] where another writer holds it, [`Error::Io`] where the lock cannot be made.
    pub fn acquire(dir: &Path) -> Result<Lock> {
        let path = dir.join(LOCK_FILE);
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(Error::io("lock", &path))?;
        match fail_point(&path).map_err(TryLockError::Error).and_then(|()| file.try_lock()) {
            Ok(()) => Ok(Lock { file, process: std::process::id() }),
            Err(TryLockError::WouldBlock) => Err(Error::Locked { path: dir.to_owned() }),
            Err(TryLockError::Error(error)) => Err(Error::io("lock", &path)(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::fail_point::Fault;

    #[test]
    fn a_second_writer_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::acquire(dir.path()).unwrap();
        let text = Lock::acquire(dir.path()).unwrap_err().to_string();
        assert!(text.contains("another tracker") && text.contains(dir.path().to_str().unwrap()), "{text}");
        drop(first);
        Lock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn where_files_cannot_be_locked_nothing_is_written_and_the_remedy_is_told() {
        let dir = tempfile::tempdir().unwrap();
        for code in [rustix::io::Errno::NOLCK, rustix::io::Errno::OPNOTSUPP, rustix::io::Errno::NOSYS] {
            let _fault = Fault::within(dir.path(), 0..1, code.raw_os_error());
            let text = Lock::acquire(dir.path()).unwrap_err().to_string();
            let told = text.contains("cannot lock") && text.contains("put the run on another one");
            assert!(told && text.contains(dir.path().to_str().unwrap()), "{text}");
        }
        Lock::acquire(dir.path()).unwrap();
    }
}
