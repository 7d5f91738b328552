//! An evaluation by a command of the shell.

use std::ffi::{OsStr, OsString};
use std::io::{self, PipeReader, PipeWriter};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::candidates::Candidate;
use super::output::{self, Tails};
use super::score::score;
use super::template::Template;
use crate::error::{Error, Result};
use crate::planning::profile_json;

/// Runs the command in `$1`, in a process group of its own, and kills all of the group when our end of the pipe on its
/// standard input is closed: after the command, after its time is up, and when this process ends in whatever way.
const SUPERVISE: &str = r#"exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
exec 3<&- sh -c "$1""#;

/// How many lines of it an error shows.
const SHOWN: usize = 5;

/// A command that evaluates an average: it is run by `sh -c` and prints the score, at the end of its last line.
///
/// `{}` stands for the path of the average's file, quoted for the shell, with or without quotes around it. `POSTHOC_EMA_WEIGHTS` holds the path too, and
/// `POSTHOC_EMA_PROFILE` the profile as JSON. Its standard input is empty.
#[derive(Clone, Debug)]
pub struct Command {
    text: Template,
    timeout: Option<Duration>,
}

impl Command {
    /// A command, and how long it may take for one average.
    ///
    /// # Errors
    /// [`Error::Setting`] for a command without `{}`, or with one inside of quotes that hold more.
    pub fn new(text: &str, timeout: Option<Duration>) -> Result<Command> {
        let text = Template::new(text).map_err(|reason| Error::Setting { option: "eval", reason })?;
        Ok(Command { text, timeout })
    }

    /// Runs the command for one average; `relay` is given what it writes to its standard error.
    ///
    /// # Errors
    /// Why there is no score: the exit status, a signal, the time, or an output without a number, with the end of it.
    pub fn evaluate(&self, candidate: &Candidate<'_>, relay: &(dyn Fn(&[u8]) + Sync)) -> Result<f64, String> {
        let ended = self.run(candidate, relay).map_err(|error| format!("cannot run the shell: {error}"))?;
        let (end, Tails { stdout, stderr }) = ended;
        let why = match end {
            End::TimeIsUp(limit) => format!("it took longer than {} s", limit.as_secs_f64()),
            End::Exit(status) if !status.success() => describe(status),
            End::Exit(_) => match score(&String::from_utf8_lossy(&stdout)) {
                Ok(score) => return Ok(score),
                Err(why) => why,
            },
        };
        Err(with_tail(why, if stderr.is_empty() { &stdout } else { &stderr }))
    }

    fn run(&self, candidate: &Candidate<'_>, relay: &(dyn Fn(&[u8]) + Sync)) -> io::Result<(End, Tails)> {
        let (alive_there, alive) = io::pipe()?;
        let (out, out_there) = io::pipe()?;
        let (err, err_there) = io::pipe()?;
        let child = self.spawn(candidate, alive_there, out_there, err_there)?;
        let (outputs, ended) = output::read(out, err);
        thread::scope(|scope| {
            let tails = scope.spawn(|| outputs.collect(relay));
            let end = wait(child, alive, self.timeout);
            drop(ended);
            Ok((end?, tails.join().unwrap_or_default()))
        })
    }

    fn spawn(
        &self,
        candidate: &Candidate<'_>,
        stdin: PipeReader,
        stdout: PipeWriter,
        stderr: PipeWriter,
    ) -> io::Result<Child> {
        // The shell's ends of the pipes are closed here with the command that holds them.
        std::process::Command::new("sh")
            .args([OsStr::new("-c"), OsStr::new(SUPERVISE), OsStr::new("sh")])
            .arg(OsString::from_vec(self.text.fill(&quote(candidate.path.as_os_str().as_bytes()))))
            .env("POSTHOC_EMA_WEIGHTS", candidate.path)
            .env("POSTHOC_EMA_PROFILE", profile_json(&candidate.plan.profile))
            .process_group(0)
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::from(stdout))
            .stderr(Stdio::from(stderr))
            .spawn()
    }
}

/// How a command ended.
enum End {
    Exit(ExitStatus),
    TimeIsUp(Duration),
}

/// Waits for a command; whatever it leaves behind ends with the pipe.
fn wait(mut child: Child, alive: PipeWriter, timeout: Option<Duration>) -> io::Result<End> {
    let Some(limit) = timeout else {
        let status = child.wait();
        drop(alive);
        return status.map(End::Exit);
    };
    let (start, mut pause) = (Instant::now(), Duration::from_millis(1));
    while start.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(End::Exit(status));
        }
        thread::sleep(pause.min(limit.saturating_sub(start.elapsed())));
        pause = (2 * pause).min(Duration::from_millis(50));
    }
    drop(alive);
    // It may have gone to another process group.
    child.kill()?;
    child.wait()?;
    Ok(End::TimeIsUp(limit))
}

/// A path as one word of the shell.
fn quote(path: &[u8]) -> Vec<u8> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+=:,%@".contains(byte);
    if path.iter().all(plain) && !path.is_empty() {
        return path.to_vec();
    }
    let mut quoted = vec![b'\''];
    for &byte in path {
        if byte == b'\'' { quoted.extend_from_slice(br"'\''") } else { quoted.push(byte) }
    }
    quoted.push(b'\'');
    quoted
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(126 | 127), _) => "the shell could not run it".into(),
        // How a shell tells that a signal ended what it ran.
        (Some(code @ 129..160), _) => format!("its exit status is {code}, as of signal {}", code - 128),
        (Some(code), _) => format!("its exit status is {code}"),
        (None, Some(signal)) => format!("signal {signal} ended it"),
        (None, None) => format!("it ended without an exit status ({status})"),
    }
}

/// A reason, and the last lines of the output.
fn with_tail(why: String, output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let shown = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
    if shown.is_empty() || why.contains(&shown) { why } else { format!("{why}; the end of its output:\n{shown}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_one_word_of_the_shell() {
        let every: Vec<u8> = (1..=255).collect();
        for path in [b"/a/b-1.safetensors".as_slice(), b"", b"it's", b"a b\n$HOME `x` \"y\" \\ * ~ #", &every] {
            let script = [b"printf %s ", quote(path).as_slice()].concat();
            let output = std::process::Command::new("sh").arg("-c").arg(OsStr::from_bytes(&script)).output().unwrap();
            assert!(output.status.success() && output.stdout == path, "{path:?}");
        }
        assert_eq!(quote(b"/a/b-1.safetensors"), b"/a/b-1.safetensors", "what is plain stays readable");
    }

    #[test]
    fn the_end_of_an_output_is_shown() {
        let output: String = (0..20).map(|i| format!("line {i}\n\n")).collect();
        let text = with_tail("it failed".into(), output.as_bytes());
        assert!(text.starts_with("it failed; the end of its output:\nline 15\n") && text.lines().count() == 6);
    }
}
