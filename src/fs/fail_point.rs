//! Failures of the file system on purpose, for tests: every step that changes what is on disk goes by here.

/// Called before a step; fails where a test has asked for that.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn fail_point(_: &std::path::Path) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
pub(crate) use injected::{Fault, fail_point};

#[cfg(test)]
mod injected {
    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// What is to fail, by directory: tests run side by side, and threads of their own write for them.
    static PLANNED: Mutex<Vec<Planned>> = Mutex::new(Vec::new());

    struct Planned {
        dir: PathBuf,
        steps: usize,
        first: usize,
        /// One more than the last step that fails.
        end: usize,
        code: i32,
    }

    /// Failures of the steps within a directory, until it is dropped.
    pub(crate) struct Fault(PathBuf);

    impl Fault {
        /// The steps of this range fail, counted from 0, with an error code of the system.
        pub(crate) fn within(dir: &Path, steps: std::ops::Range<usize>, code: i32) -> Fault {
            planned().push(Planned { dir: dir.to_owned(), steps: 0, first: steps.start, end: steps.end, code });
            Fault(dir.to_owned())
        }

        /// How many steps there were so far.
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
