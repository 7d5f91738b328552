//! Progress of a pass that may begin again.

use std::sync::atomic::{AtomicU64, Ordering};

/// Function of the bytes read since its last call.
type Report<'a> = &'a (dyn Fn(u64) + Sync);

/// Progress of a pass. After a restart, bytes that were reported already are not reported again.
pub(super) struct PassProgress<'a> {
    report: Option<Report<'a>>,
    /// Bytes read since the pass began, or began again.
    done: AtomicU64,
    /// Bytes reported.
    reported: AtomicU64,
}

impl<'a> PassProgress<'a> {
    pub(super) fn new(report: Option<Report<'a>>) -> PassProgress<'a> {
        PassProgress { report, done: AtomicU64::new(0), reported: AtomicU64::new(0) }
    }

    /// Adds bytes that were read.
    pub(super) fn add(&self, bytes: u64) {
        let Some(report) = self.report else { return };
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let reported = self.reported.fetch_max(done, Ordering::Relaxed);
        if done > reported {
            report(done - reported);
        }
    }

    /// Begins the pass again.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn restart(&self) {
        self.done.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pass_that_begins_again_reports_each_byte_once() {
        let total = AtomicU64::new(0);
        let add = |bytes| {
            assert!(bytes > 0);
            total.fetch_add(bytes, Ordering::Relaxed);
        };
        let progress = PassProgress::new(Some(&add));
        let after = |bytes| {
            progress.add(bytes);
            total.load(Ordering::Relaxed)
        };
        assert_eq!([40, 30].map(after), [40, 70]);
        progress.restart();
        assert_eq!([30, 30, 30, 10].map(after), [70, 70, 90, 100]);
        std::thread::scope(|scope| {
            progress.restart();
            (0..4).for_each(|_| drop(scope.spawn(|| (0..50).for_each(|_| progress.add(1)))));
        });
        assert_eq!(total.into_inner(), 200);
    }
}
