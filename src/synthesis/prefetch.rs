//! Files that are not in the page cache are asked for ahead.
//!
//! A pass reads a stretch of every source, then the next one of each. Left to page faults, a disk sees forty readers that
//! wait for one page at a time; told what comes next, it has the next stretches of all of them to fetch while this one is
//! worked on. In the page cache telling it costs a tenth of the pass, so only those who wait do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Bytes a second: a thread that reads fewer is waiting for a disk, or has so much to compute that asking is for nothing.
const FROM_MEMORY: f64 = 4e9;

/// How fast the last stretch came.
pub(super) struct Prefetcher {
    waits: AtomicBool,
}

impl Prefetcher {
    /// Before the first stretch, which is taken to come from a disk.
    pub(super) fn new() -> Prefetcher {
        Prefetcher { waits: AtomicBool::new(true) }
    }

    /// Works on a stretch of so many bytes. `ask` asks for what comes next, and is left out where nothing is waited for.
    pub(super) fn around<R>(&self, bytes: u64, ask: impl FnOnce(), work: impl FnOnce() -> R) -> R {
        if self.waits.load(Ordering::Relaxed) {
            ask();
        }
        let begin = Instant::now();
        let done = work();
        let waits = (bytes as f64) < FROM_MEMORY * begin.elapsed().as_secs_f64();
        self.waits.store(waits, Ordering::Relaxed);
        done
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_comes_next_is_asked_for_while_there_is_something_to_wait_for() {
        let (ahead, asked) = (Prefetcher::new(), Cell::new(0));
        let ask = || asked.set(asked.get() + 1);
        let sleep = || std::thread::sleep(Duration::from_millis(2));
        for (bytes, expected) in [(u64::MAX, 1), (1, 1), (u64::MAX, 2), (u64::MAX, 2), (1, 2), (1, 3)] {
            ahead.around(bytes, ask, sleep);
            assert_eq!(asked.get(), expected);
        }
    }
}
