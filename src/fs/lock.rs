//! Lock of a run, held while it is being written.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use super::fail_point::fail_point;
use crate::error::{Error, Result};

/// File name of the lock within a run. The file is never removed: that would race with the next writer.
const LOCK_FILE: &str = ".lock";

/// Guard of a locked run. The system releases the lock even if the process is killed.
#[derive(Debug)]
pub struct Lock {
    file: File,
    /// Process that took the lock. A forked child shares the open file and must not release it.
    process: u32,
}

/// Unlocks explicitly: closing the file is not enough while a forked child, such as a data loader, has it open.
impl Drop for Lock {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            // If this fails, closing the file releases the lock.
            let _ = self.file.unlock();
        }
    }
}

impl Lock {
    /// Locks a run for writing.
    ///
    /// # Errors
    /// [`Error::Locked`] if another writer holds it, [`Error::Io`] if the lock cannot be taken.
    pub fn acquire(dir: &Path) -> Result<Lock> {
        let path = dir.join(LOCK_FILE);
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(Error::io("open", &path))?;
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
    fn second_writer_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::acquire(dir.path()).unwrap();
        let text = Lock::acquire(dir.path()).unwrap_err().to_string();
        assert!(text.contains("another tracker") && text.contains(dir.path().to_str().unwrap()), "{text}");
        drop(first);
        Lock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn file_system_without_locks_is_an_error_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        for code in [rustix::io::Errno::NOLCK, rustix::io::Errno::OPNOTSUPP, rustix::io::Errno::NOSYS] {
            let _fault = Fault::within(dir.path(), 0..1, code.raw_os_error());
            let text = Lock::acquire(dir.path()).unwrap_err().to_string();
            assert!(text.contains("cannot lock") && text.contains("put the run on another one"), "{text}");
            assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
        }
        Lock::acquire(dir.path()).unwrap();
    }
}
