//! Operations that change the disk, and injected failures of them, for tests.

use std::io;
use std::path::Path;

use crate::error::{Error, Result};

/// Runs an operation that changes what is on disk at `path`. `action` is the verb of its error.
///
/// # Errors
/// [`Error::Io`], also if a test has injected a fault.
pub(crate) fn attempt<T>(action: &'static str, path: &Path, operation: impl FnOnce() -> io::Result<T>) -> Result<T> {
    fail_point(path).and_then(|()| operation()).map_err(Error::io(action, path))
}

/// Called before an operation. Fails if a test has injected a fault.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn fail_point(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
pub(crate) use injected::{Fault, fail_point};

#[cfg(test)]
mod injected {
    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// Planned faults, by directory: tests run in parallel, and other threads write for them.
    static PLANNED: Mutex<Vec<Planned>> = Mutex::new(Vec::new());

    struct Planned {
        dir: PathBuf,
        steps: usize,
        first: usize,
        /// One past the last operation that fails.
        end: usize,
        code: i32,
    }

    /// Guard that makes operations within a directory fail until it is dropped.
    pub(crate) struct Fault(PathBuf);

    impl Fault {
        /// Plans that the operations of a range, counted from 0, fail with an error code of the system.
        pub(crate) fn within(dir: &Path, steps: std::ops::Range<usize>, code: i32) -> Fault {
            planned().push(Planned { dir: dir.to_owned(), steps: 0, first: steps.start, end: steps.end, code });
            Fault(dir.to_owned())
        }

        /// Returns the number of operations so far.
        pub(crate) fn steps(&self) -> usize {
            planned().iter().find(|planned| planned.dir == self.0).map_or(0, |planned| planned.steps)
        }
    }

    impl Drop for Fault {
        fn drop(&mut self) {
            planned().retain(|planned| planned.dir != self.0);
        }
    }

    pub(crate) fn fail_point(path: &Path) -> io::Result<()> {
        let mut planned = planned();
        let Some(planned) = planned.iter_mut().find(|planned| path.starts_with(&planned.dir)) else { return Ok(()) };
        let step = planned.steps;
        planned.steps += 1;
        let fails = (planned.first..planned.end).contains(&step);
        if fails { Err(io::Error::from_raw_os_error(planned.code)) } else { Ok(()) }
    }

    fn planned() -> MutexGuard<'static, Vec<Planned>> {
        PLANNED.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
