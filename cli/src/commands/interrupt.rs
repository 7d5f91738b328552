//! Ctrl-C and the like: nothing is left of what was being written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// Whether a signal has come, and the program ends by it.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Has the signals that end a program remove its temporary files first. Where that cannot be, the next command removes them.
pub fn clear_up() {
    let wanted = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|&signal| !is_ignored(signal));
    let Ok(mut signals) = Signals::new(wanted) else { return };
    std::thread::spawn(move || {
        let Some(signal) = signals.forever().next() else { return };
        ENDING.store(true, Ordering::SeqCst);
        posthoc_ema::fs::remove_unfinished();
        let _ = emulate_default_handler(signal);
        std::process::exit(128 + signal);
    });
}

/// Does not return once a signal has come: that the files of a command were taken from it is no error to tell of.
pub fn wait_for_end() {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether whoever started the program wants a signal ignored, as `nohup` does, and scripts for what they put in the background.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
