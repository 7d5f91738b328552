//! Counts instructions in single steps.

use std::process::Command;

use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::work::{self, Row};

/// Argument that starts this program as the child that is counted.
pub const CHILD: &str = "--count";

/// Sizes of the work in tiles. All are whole tiles of every loop, so work outside of the loops cancels in the
/// difference.
const SIZES: [usize; 2] = [1, 2];

/// Returns the instructions that one more element takes.
#[allow(clippy::zombie_processes, reason = "it is waited for by its number")]
pub fn per_element(row: &Row) -> f64 {
    let child =
        Command::new(std::env::current_exe().expect("this program has a path")).args([CHILD, &row.name()]).spawn();
    let child = child.expect("this program can be started again");
    let pid = Pid::from_raw(child.id().try_into().expect("process numbers are small"));
    // The child is traced only after `exec`, so the first stop is its own.
    assert_eq!(waitpid(pid, None), Ok(WaitStatus::Stopped(pid, Signal::SIGSTOP)), "{}", row.name());
    let [few, many] = SIZES.map(|_| region(pid));
    ptrace::cont(pid, None).expect("the child waits");
    assert_eq!(waitpid(pid, None), Ok(WaitStatus::Exited(pid, 0)), "{}", row.name());
    (many - few) as f64 / ((SIZES[1] - SIZES[0]) * work::TILE) as f64
}

/// Counts the steps from one stop of the child to the next.
fn region(pid: Pid) -> u64 {
    for steps in 1.. {
        ptrace::step(pid, None).expect("the child waits");
        match waitpid(pid, None) {
            Ok(WaitStatus::Stopped(_, Signal::SIGTRAP)) => {}
            Ok(WaitStatus::Stopped(_, Signal::SIGSTOP)) => return steps,
            other => panic!("the counted child stopped in another way: {other:?}"),
        }
    }
    unreachable!("a u64 holds every count")
}

/// Does the work of a row in the child, once for each size, with a stop before and after each.
pub fn be_counted(name: &str) {
    // Only this thread is counted, so it does all the work.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global();
    pool.expect("no other pool has been made");
    let row = work::rows().into_iter().find(|row| row.name() == name).expect("the parent names one of the rows");
    let mut sizes = SIZES.map(|tiles| row.prepare(tiles * work::TILE));
    // A first run does the work that happens only once.
    sizes.iter_mut().for_each(|work| work());
    ptrace::traceme().expect("a parent traces its child");
    let stop = || raise(Signal::SIGSTOP).expect("a process stops itself");
    stop();
    for work in &mut sizes {
        work();
        stop();
    }
}
