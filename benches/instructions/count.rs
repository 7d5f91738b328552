//! Counting by single steps.

use std::process::Command;

use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::work::{self, Row};

/// The argument that makes a process the one that is counted.
pub const CHILD: &str = "--count";

/// Tiles of elements in the two sizes: whole tiles of every loop, and enough that what is not of a tile cancels.
const SIZES: [usize; 2] = [1, 2];

/// The instructions that one more element takes.
#[allow(clippy::zombie_processes, reason = "it is waited for by its number")]
pub fn per_element(row: &Row) -> f64 {
    let child =
        Command::new(std::env::current_exe().expect("this program has a path")).args([CHILD, &row.name()]).spawn();
    let child = child.expect("this program can be started again");
    let pid = Pid::from_raw(child.id().try_into().expect("process numbers are small"));
    // Started by `exec`, which has not happened to a traced process yet: the first stop is the child's own.
    assert_eq!(waitpid(pid, None), Ok(WaitStatus::Stopped(pid, Signal::SIGSTOP)), "{}", row.name());
    let [few, many] = SIZES.map(|_| region(pid));
    ptrace::cont(pid, None).expect("the child waits");
    assert_eq!(waitpid(pid, None), Ok(WaitStatus::Exited(pid, 0)), "{}", row.name());
    (many - few) as f64 / ((SIZES[1] - SIZES[0]) * work::TILE) as f64
}

/// Steps from one stop of the child to its next.
fn region(pid: Pid) -> u64 {
    for steps in 1.. {
        ptrace::step(pid, None).expect("the child waits");
        match waitpid(pid, None) {
            Ok(WaitStatus::Stopped(_, Signal::SIGTRAP)) => {}
            Ok(WaitStatus::Stopped(_, Signal::SIGSTOP)) => return steps,
            other => panic!("the child that is counted went another way: {other:?}"),
        }
    }
    unreachable!("nobody counts so far")
}

/// Does the work of a row, of each size once, between stops.
pub fn be_counted(name: &str) {
    // All work is done by the thread that is counted.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global();
    pool.expect("no other pool has been made");
    let row = work::rows().into_iter().find(|row| row.name() == name).expect("the parent asks for what there is");
    let mut sizes = SIZES.map(|tiles| row.prepare(tiles * work::TILE));
    // Once before: what is done the first time only is not counted.
    sizes.iter_mut().for_each(|work| work());
    ptrace::traceme().expect("a parent traces its child");
    let stop = || raise(Signal::SIGSTOP).expect("a process stops itself");
    stop();
    for work in &mut sizes {
        work();
        stop();
    }
}
