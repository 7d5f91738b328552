//! Prefetch of files that are not in the page cache.
//!
//! A pass reads a stretch of every source, then the next stretch of each. With page faults alone, a disk serves dozens
//! of readers that each wait for one page at a time. With prefetching it can fetch the next stretches of all sources
//! while this one is blended. In the page cache the calls would cost a tenth of the pass, so only a pass that waits
//! makes them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Bytes per second below which a thread counts as waiting for a disk. It may also be busy computing, and then gains
/// nothing.
const DISK_RATE: f64 = 4e9;

/// Prefetches while the last stretch took so long that it came from a disk.
pub(super) struct Prefetcher {
    is_waiting: AtomicBool,
}

impl Prefetcher {
    /// Assumes that the first stretch comes from a disk.
    pub(super) fn new() -> Prefetcher {
        Prefetcher { is_waiting: AtomicBool::new(true) }
    }

    /// Runs `work`, which reads `bytes`. Calls `prefetch` first if the last stretch came from a disk.
    pub(super) fn run<R>(&self, bytes: u64, prefetch: impl FnOnce(), work: impl FnOnce() -> R) -> R {
        if self.is_waiting.load(Ordering::Relaxed) {
            prefetch();
        }
        let start = Instant::now();
        let done = work();
        let is_waiting = (bytes as f64) < DISK_RATE * start.elapsed().as_secs_f64();
        self.is_waiting.store(is_waiting, Ordering::Relaxed);
        done
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    #[test]
    fn prefetch_follows_slow_reads_only() {
        let prefetcher = Prefetcher::new();
        let calls = Cell::new(0);
        let prefetch = || calls.set(calls.get() + 1);
        let sleep = || std::thread::sleep(Duration::from_millis(2));
        for (bytes, expected) in [(u64::MAX, 1), (1, 1), (u64::MAX, 2), (u64::MAX, 2), (1, 2), (1, 3)] {
            prefetcher.run(bytes, prefetch, sleep);
            assert_eq!(calls.get(), expected);
        }
    }
}
