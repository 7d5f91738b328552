//! The threads that compute.

use std::error::Error as _;
use std::io;
use std::sync::OnceLock;

use rayon::ThreadPoolBuilder;

use crate::error::{Error, Result};

/// Outcome of the only attempt that rayon makes: the number of the system's error, if there was one.
static STARTED: OnceLock<Result<(), Option<i32>>> = OnceLock::new();

/// Starts the threads that compute, unless they run already. In a thread pool of the caller's, that pool computes.
///
/// If the system cannot start them, the first computation would panic.
///
/// # Errors
/// [`Error::Threads`], also for all later calls.
pub fn start_threads() -> Result<()> {
    if rayon::current_thread_index().is_some() {
        return Ok(());
    }
    STARTED.get_or_init(start).map_err(|number| Error::Threads {
        source: number.map_or_else(|| io::ErrorKind::WouldBlock.into(), io::Error::from_raw_os_error),
    })
}

fn start() -> Result<(), Option<i32>> {
    let Err(error) = ThreadPoolBuilder::new().build_global() else { return Ok(()) };
    match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        Some(source) => Err(source.raw_os_error()),
        // Other code of this process has started them.
        None => Ok(()),
    }
}
