//! Signals that end the program: temporary files are removed first.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvError};
use std::thread;
use std::time::Duration;

use posthoc_ema::Error;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// True once a signal has come that ends the program.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Makes the signals that end a program remove its temporary files first.
///
/// # Errors
/// [`Error::Threads`] if the system cannot start a thread for the handler, [`Error::Io`] if it cannot be installed.
pub fn remove_temporary_files_on_signal() -> Result<(), Error> {
    let handled: Vec<i32> = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|&signal| !is_ignored(signal)).collect();
    let (report, installed) = mpsc::channel();
    // Installed by the thread itself: a handled signal without the thread would do nothing.
    let handle = move || {
        let mut signals = match Signals::new(handled) {
            Ok(signals) => signals,
            Err(error) => return drop(report.send(error)),
        };
        drop(report);
        let Some(signal) = signals.forever().next() else { return };
        ENDING.store(true, Ordering::SeqCst);
        posthoc_ema::fs::remove_unfinished();
        let _ = emulate_default_handler(signal);
        std::process::exit(128 + signal);
    };
    thread::Builder::new().spawn(handle).map_err(|source| Error::Threads { source })?;
    match installed.recv() {
        Ok(error) => Err(Error::io("handle signals in", Path::new("posthoc-ema"))(error)),
        Err(RecvError) => Ok(()),
    }
}

/// Never returns after a signal: the handler ends the program, and errors about the removed files are not reported.
pub fn wait_for_signal_handler() {
    while ENDING.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(10));
    }
}

/// Returns true if the parent process had the signal ignored, as `nohup` and background jobs of scripts do.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
