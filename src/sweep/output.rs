//! Standard output and standard error of a command.

use std::io::{self, PipeReader, Read};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of an output that are kept, from its end.
const KEPT_BYTES: usize = 16 << 10;

/// Number of pieces of output in the channel. A reader with more blocks.
const QUEUED_PIECES: usize = 16;

/// Time for which the pipes are still read after the command ended. Its own output is in them already. A pipe that
/// stays open belongs to a process that the command left behind in a session of its own, which cannot be killed.
const GRACE: Duration = Duration::from_secs(1);

/// Message to the collector of the outputs.
enum Event {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    CommandEnded,
}

/// Last bytes of both outputs.
#[derive(Default)]
pub(super) struct Tails {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// Receiver of both outputs, which detached threads read.
pub(super) struct Outputs(Receiver<Event>);

/// Guard that reports the end of the command when it is dropped.
pub(super) struct EndSignal(SyncSender<Event>);

impl Drop for EndSignal {
    fn drop(&mut self) {
        // Fails if both outputs ended before.
        let _ = self.0.send(Event::CommandEnded);
    }
}

/// Spawns a thread for each output that reads it.
///
/// # Errors
/// If the system cannot start a thread.
pub(super) fn spawn_readers(stdout: PipeReader, stderr: PipeReader) -> io::Result<(Outputs, EndSignal)> {
    let (sender, receiver) = mpsc::sync_channel(QUEUED_PIECES);
    for (pipe, event) in [(stdout, Event::Stdout as fn(Vec<u8>) -> Event), (stderr, Event::Stderr)] {
        let sender = sender.clone();
        thread::Builder::new().spawn(move || forward(pipe, event, &sender))?;
    }
    Ok((Outputs(receiver), EndSignal(sender)))
}

impl Outputs {
    /// Receives both outputs until they end, or until [`GRACE`] after the command ended, and returns their last bytes.
    /// `relay` receives the whole standard error.
    pub(super) fn collect(self, relay: &dyn Fn(&[u8])) -> Tails {
        let mut tails = Tails::default();
        let mut deadline: Option<Instant> = None;
        loop {
            let event = match deadline {
                None => self.0.recv().ok(),
                Some(deadline) => self.0.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok(),
            };
            match event {
                None => return tails,
                Some(Event::CommandEnded) => deadline = Some(Instant::now() + GRACE),
                Some(Event::Stdout(bytes)) => append(&mut tails.stdout, &bytes),
                Some(Event::Stderr(bytes)) => {
                    relay(&bytes);
                    append(&mut tails.stderr, &bytes);
                }
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return tails;
            }
        }
    }
}

/// Sends the bytes of a pipe until its end, or until the receiver is gone.
fn forward(mut from: PipeReader, event: fn(Vec<u8>) -> Event, to: &SyncSender<Event>) {
    let mut buffer = vec![0; KEPT_BYTES];
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

/// Appends bytes, and drops all but the last [`KEPT_BYTES`].
fn append(tail: &mut Vec<u8>, bytes: &[u8]) {
    tail.extend_from_slice(bytes);
    tail.drain(..tail.len().saturating_sub(KEPT_BYTES));
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn tails_keep_last_bytes_and_relay_gets_all() {
        let (stdout, child_stdout) = io::pipe().unwrap();
        let (stderr, mut child_stderr) = io::pipe().unwrap();
        drop(child_stdout);
        let (outputs, end_signal) = spawn_readers(stdout, stderr).unwrap();
        let writer = thread::spawn(move || (0..200_000).try_for_each(|i| writeln!(child_stderr, "line {i}")).unwrap());
        let relayed = AtomicUsize::new(0);
        let count = |bytes: &[u8]| {
            relayed.fetch_add(bytes.len(), Ordering::Relaxed);
        };
        let tails = thread::scope(|scope| {
            let tails = scope.spawn(|| outputs.collect(&count));
            writer.join().unwrap();
            drop(end_signal);
            tails.join().unwrap()
        });
        assert!(
            tails.stderr.len() == KEPT_BYTES && tails.stderr.ends_with(b"line 199999\n") && tails.stdout.is_empty()
        );
        assert_eq!(relayed.into_inner(), (0..200_000).map(|i| format!("line {i}\n").len()).sum::<usize>());
    }

    #[test]
    fn pipe_left_open_does_not_block() {
        let (stdout, mut child_stdout) = io::pipe().unwrap();
        let (stderr, child_stderr) = io::pipe().unwrap();
        child_stdout.write_all(b"0.5\n").unwrap();
        let (outputs, end_signal) = spawn_readers(stdout, stderr).unwrap();
        drop(end_signal);
        assert_eq!(outputs.collect(&|_| ()).stdout, b"0.5\n");
        drop((child_stdout, child_stderr));
    }
}
