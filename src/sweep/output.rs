//! What an evaluation writes, read until it is over.

use std::io::{self, PipeReader, Read};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

/// How much of an output is kept, from its end.
const KEPT: usize = 16 << 10;

/// How many pieces of output wait to be taken.
const WAITING: usize = 16;

/// How long the pipes are read when the command has ended: what it wrote lies in them already, and whoever still holds
/// them is a process that it left behind in a session of its own, out of our reach.
const GRACE: Duration = Duration::from_secs(1);

/// What is told while a command runs.
enum Event {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Ended,
}

/// The ends of both outputs.
#[derive(Default)]
pub(super) struct Tails {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// Both outputs while they are read, by threads that nobody waits for.
pub(super) struct Outputs(Receiver<Event>);

/// Tells the reader that the command has ended; dropped, it does so.
pub(super) struct Ended(SyncSender<Event>);

impl Drop for Ended {
    fn drop(&mut self) {
        // Nobody listens where both outputs ended before.
        let _ = self.0.send(Event::Ended);
    }
}

/// Begins to read both outputs.
pub(super) fn read(stdout: PipeReader, stderr: PipeReader) -> (Outputs, Ended) {
    let (sender, receiver) = mpsc::sync_channel(WAITING);
    for (pipe, event) in [(stdout, Event::Stdout as fn(Vec<u8>) -> Event), (stderr, Event::Stderr)] {
        let sender = sender.clone();
        thread::spawn(move || pump(pipe, event, &sender));
    }
    (Outputs(receiver), Ended(sender))
}

impl Outputs {
    /// The last of both outputs: read to their ends, or for a moment after the command's; `relay` is given the second.
    pub(super) fn collect(self, relay: &dyn Fn(&[u8])) -> Tails {
        let (mut tails, mut deadline) = (Tails::default(), None::<Instant>);
        loop {
            let event = match deadline {
                None => self.0.recv().ok(),
                Some(deadline) => self.0.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok(),
            };
            match event {
                None => return tails,
                Some(Event::Ended) => deadline = Some(Instant::now() + GRACE),
                Some(Event::Stdout(bytes)) => keep(&mut tails.stdout, &bytes),
                Some(Event::Stderr(bytes)) => {
                    relay(&bytes);
                    keep(&mut tails.stderr, &bytes);
                }
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return tails;
            }
        }
    }
}

/// Hands on what comes out of a pipe until its end, or until nobody takes it.
fn pump(mut from: PipeReader, event: fn(Vec<u8>) -> Event, to: &SyncSender<Event>) {
    let mut buffer = vec![0; KEPT];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                if to.send(event(buffer[..n].to_vec())).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Appends, and keeps the last.
fn keep(kept: &mut Vec<u8>, bytes: &[u8]) {
    kept.extend_from_slice(bytes);
    kept.drain(..kept.len().saturating_sub(KEPT));
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn only_the_end_of_an_output_is_kept() {
        let (out, out_there) = io::pipe().unwrap();
        let (err, mut to) = io::pipe().unwrap();
        drop(out_there);
        let (outputs, ended) = read(out, err);
        let writer = thread::spawn(move || (0..200_000).try_for_each(|i| writeln!(to, "line {i}")).unwrap());
        let relayed = AtomicUsize::new(0);
        let count = |bytes: &[u8]| {
            relayed.fetch_add(bytes.len(), Ordering::Relaxed);
        };
        let tails = thread::scope(|scope| {
            let tails = scope.spawn(|| outputs.collect(&count));
            writer.join().unwrap();
            drop(ended);
            tails.join().unwrap()
        });
        assert!(tails.stderr.len() == KEPT && tails.stderr.ends_with(b"line 199999\n") && tails.stdout.is_empty());
        assert_eq!(relayed.into_inner(), (0..200_000).map(|i| format!("line {i}\n").len()).sum::<usize>());
    }

    #[test]
    fn a_pipe_that_stays_open_is_not_waited_for() {
        let (out, mut out_there) = io::pipe().unwrap();
        let (err, err_there) = io::pipe().unwrap();
        out_there.write_all(b"0.5\n").unwrap();
        let (outputs, ended) = read(out, err);
        drop(ended);
        assert_eq!(outputs.collect(&|_| ()).stdout, b"0.5\n");
        drop((out_there, err_there));
    }
}
