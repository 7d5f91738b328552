//! Evaluation by a shell command.

use std::ffi::OsStr;
use std::io::{self, PipeReader, PipeWriter};
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::candidates::Candidate;
use super::output::{self, Tails};
use super::score::{named_scores, score};
use super::scores::Scores;
use super::template::{Template, WEIGHTS, WITH};
use super::trial::Metric;
use crate::error::{Error, Result, remedy};
use crate::fs::process;
use crate::planning::profile_json;

/// Environment variable of the command that holds the profile as JSON.
const PROFILE: &str = "POSTHOC_EMA_PROFILE";

/// Environment variable of the command that holds the number of the repeat.
const REPEAT: &str = "POSTHOC_EMA_REPEAT";

/// Environment variable of the command that holds the number of the job.
const JOB: &str = "POSTHOC_EMA_JOB";

/// Runs the command in `$1` in a process group of its own, and kills the whole group when our end of the pipe on its
/// standard input is closed: after the command, after the timeout, and when this process ends in any way.
const SUPERVISE: &str = r#"exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
exec 3<&- sh -c "$1""#;

/// Longest pause between two checks for the end of a command.
const MAX_PAUSE: Duration = Duration::from_millis(50);

/// Number of lines of the output that an error shows.
const SHOWN_LINES: usize = 5;

/// Shell command that evaluates an average. It is run by `sh -c` and prints the score at the end of its last line.
///
/// `{}` is replaced by the path of the average's file, quoted for the shell. The environment variable
/// `POSTHOC_EMA_WEIGHTS` holds the same path, and `POSTHOC_EMA_PROFILE` the profile as JSON. `{repeat}` and
/// `POSTHOC_EMA_REPEAT` are the number of the repeat, from 1; `{job}` and `POSTHOC_EMA_JOB` are that of the job, from
/// 0. The standard input is empty.
#[derive(Clone, Debug)]
pub struct Command {
    template: Template,
    metrics: Vec<String>,
    timeout: Option<Duration>,
}

impl Command {
    /// Checks a command, and sets the longest time that one evaluation may take.
    ///
    /// # Errors
    /// [`Error::Setting`] if the command contains neither `{}` nor `POSTHOC_EMA_WEIGHTS`, or has `{}` inside quotes.
    pub fn new(text: &str, timeout: Option<Duration>) -> Result<Command> {
        let template = Template::new(text).map_err(|reason| Error::Setting { option: "eval", reason })?;
        Ok(Command { template, metrics: Vec::new(), timeout })
    }

    /// Takes the values of these metrics from lines `name: value`, instead of one number from the last line.
    pub fn with_metrics(self, metrics: &[Metric]) -> Command {
        Command { metrics: metrics.iter().map(|metric| metric.name.clone()).collect(), ..self }
    }

    /// Runs the command for one average. `relay` receives what it writes to its standard error.
    ///
    /// # Errors
    /// Returns the reason of a failure: an exit status, a signal, the timeout, or an output without the numbers. The
    /// last lines of the output follow.
    pub fn evaluate(&self, candidate: &Candidate<'_>, relay: &(dyn Fn(&[u8]) + Sync)) -> Result<Scores, String> {
        let ended = self.run(candidate, relay).map_err(|error| not_run(&error))?;
        let (end, Tails { stdout, stderr }) = ended;
        let why = match end {
            End::Timeout(limit) => format!("it took longer than {} s", limit.as_secs_f64()),
            End::Exit(status) if !status.success() => describe(status),
            End::Exit(_) => match self.scores(&String::from_utf8_lossy(&stdout)) {
                Ok(score) => return Ok(score),
                Err(why) => why,
            },
        };
        Err(with_tail(why, if stderr.is_empty() { &stdout } else { &stderr }))
    }

    /// Checks that the command uses the average of the second run.
    ///
    /// # Errors
    /// [`Error::Setting`] if it contains neither `{with}` nor `POSTHOC_EMA_WITH`.
    pub fn with_second(self) -> Result<Command> {
        if self.template.has_second() {
            return Ok(self);
        }
        let reason = "it names no average of the second run: write {with} where its path goes".into();
        Err(Error::Setting { option: "eval", reason })
    }

    fn scores(&self, output: &str) -> Result<Scores, String> {
        if self.metrics.is_empty() { score(output).map(Scores::from) } else { named_scores(output, &self.metrics) }
    }

    fn run(&self, candidate: &Candidate<'_>, relay: &(dyn Fn(&[u8]) + Sync)) -> io::Result<(End, Tails)> {
        let (child_stdin, alive) = io::pipe()?;
        let (stdout, child_stdout) = io::pipe()?;
        let (stderr, child_stderr) = io::pipe()?;
        // All threads are started before the command, which would otherwise run on after an error.
        let (outputs, end_signal) = output::spawn_readers(stdout, stderr)?;
        thread::scope(|scope| {
            let tails = thread::Builder::new().spawn_scoped(scope, || outputs.collect(relay))?;
            let child = self.spawn(candidate, child_stdin, child_stdout, child_stderr);
            let end = child.and_then(|child| wait(child, alive, self.timeout));
            drop(end_signal);
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
        // Our copies of the shell's pipe ends are closed with the `Command` that owns them, at the end of this
        // function.
        let second = candidate.with.map(|path| path.as_os_str().as_encoded_bytes());
        let numbers = [("{repeat}", candidate.repeat), ("{job}", candidate.job)];
        let text = self.template.fill(candidate.path.as_os_str().as_encoded_bytes(), second, &numbers);
        let mut command = std::process::Command::new("sh");
        process::in_new_group(&mut command)
            .args([OsStr::new("-c"), OsStr::new(SUPERVISE), OsStr::new("sh")])
            .arg(process::argument(text))
            .env(WEIGHTS, candidate.path)
            .envs(candidate.with.map(|path| (WITH, path)))
            .env(REPEAT, candidate.repeat.to_string())
            .env(JOB, candidate.job.to_string())
            .env(PROFILE, profile_json(&candidate.plan.profile))
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::from(stdout))
            .stderr(Stdio::from(stderr))
            .spawn()
    }
}

/// End of a command.
enum End {
    Exit(ExitStatus),
    Timeout(Duration),
}

/// Waits for a command. Closing `alive` then kills the processes that it left behind.
fn wait(mut child: Child, alive: PipeWriter, timeout: Option<Duration>) -> io::Result<End> {
    let Some(limit) = timeout else {
        let status = child.wait();
        drop(alive);
        return status.map(End::Exit);
    };
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    while start.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(End::Exit(status));
        }
        thread::sleep(pause.min(limit.saturating_sub(start.elapsed())));
        pause = (2 * pause).min(MAX_PAUSE);
    }
    drop(alive);
    // The command may have moved to another process group.
    child.kill()?;
    child.wait()?;
    Ok(End::Timeout(limit))
}

/// Describes an error of the system, with its remedy.
fn not_run(error: &io::Error) -> String {
    format!("cannot run the shell: {error}{}", remedy("start the shell", error))
}

/// Describes an exit status other than success.
fn describe(status: ExitStatus) -> String {
    match (status.code(), process::signal(status)) {
        (Some(126 | 127), _) => "the shell could not run it".into(),
        // A shell adds 128 to the number of the signal that ended its command.
        (Some(code @ 129..160), _) => format!("its exit status is {code}, as after signal {}", code - 128),
        (Some(code), _) => format!("its exit status is {code}"),
        (None, Some(signal)) => format!("signal {signal} ended it"),
        (None, None) => format!("it ended without an exit status ({status})"),
    }
}

/// Appends the last lines of the output to a reason, unless it shows them already.
fn with_tail(why: String, output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let shown = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n");
    if shown.is_empty() || why.contains(&shown) { why } else { format!("{why}; the end of its output:\n{shown}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_shows_last_lines_of_output() {
        let output: String = (0..20).map(|i| format!("line {i}\n\n")).collect();
        let text = with_tail("it failed".into(), output.as_bytes());
        assert!(text.starts_with("it failed; the end of its output:\nline 15\n") && text.lines().count() == 6);
    }
}
