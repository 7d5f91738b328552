//! Signals that end the program: temporary files are removed first.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// True once a signal has come that ends the program.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Makes the signals that end a program remove its temporary files first.
///
/// If the handler cannot be installed, the next command removes the files.
pub fn remove_temporary_files_on_signal() {
    let handled = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|&signal| !is_ignored(signal));
    let Ok(mut signals) = Signals::new(handled) else { return };
    std::thread::spawn(move || {
        let Some(signal) = signals.forever().next() else { return };
        ENDING.store(true, Ordering::SeqCst);
        posthoc_ema::fs::remove_unfinished();
        let _ = emulate_default_handler(signal);
        std::process::exit(128 + signal);
    });
}

/// Never returns after a signal: the handler ends the program, and errors about the removed files are not reported.
pub fn wait_for_signal_handler() {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Returns true if the parent process had the signal ignored, as `nohup` and background jobs of scripts do.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
