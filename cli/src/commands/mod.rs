//! Commands of the program: each parses its arguments, calls the library and prints the result.

mod advise;
mod args;
mod average;
mod bench;
mod destination;
mod error;
mod forecast;
mod form;
mod import;
mod import_averages;
mod inspect;
mod interrupt;
mod list;
mod open;
mod output;
mod part;
mod plan;
mod plot;
mod profile;
mod profile_csv;
mod source;
mod sweep;
mod sweep_errors;
mod synthesize;
mod targets;
mod verify;
mod written;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use posthoc_ema::{Error, escape_controls};

use crate::log::log_to_stderr;

/// Averages of network weights of any length, chosen after training.
///
/// A run is a directory in which training stored snapshots of two or more running averages. From them an average of
/// any length is synthesized (post-hoc EMA, Karras et al. 2023, arXiv:2312.02696).
#[derive(Parser)]
#[command(name = "posthoc-ema", version, term_width = 100, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Synthesize(synthesize::Arguments),
    Sweep(sweep::Arguments),
    Plan(plan::Arguments),
    Inspect(inspect::Arguments),
    Error(error::Arguments),
    Profile(profile::Arguments),
    Verify(verify::Arguments),
    Average(average::Arguments),
    Import(import::Arguments),
    Bench(bench::Arguments),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Reason for a nonzero exit status.
enum Failure {
    /// Arguments that contradict each other or are out of range: exit status 2.
    Usage(String),
    /// Error of the library: exit status 1.
    Failed(Error),
    /// Problem that the printed table or document shows already: exit status 1.
    Unhealthy(String),
}

impl Failure {
    /// Classifies an error that an argument may have caused: a value out of range is bad usage.
    fn of_argument(error: Error) -> Failure {
        match error {
            Error::Setting { option, reason } => match flag(option) {
                Some(flag) => Failure::Usage(format!("{flag}: {reason}")),
                None => Failure::Usage(Error::Setting { option, reason }.to_string()),
            },
            Error::Parameter { .. } | Error::NotTrackable { .. } => Failure::Usage(error.to_string()),
            other => Failure::Failed(other),
        }
    }
}

/// Returns the flag of an option of the library, if a command has one: `--update-every` for `update_every`.
fn flag(option: &str) -> Option<String> {
    let long = option.replace('_', "-");
    let command = Arguments::command();
    let mut all = command.get_subcommands().flat_map(|command| command.get_arguments());
    all.any(|argument| argument.get_long() == Some(&long)).then(|| format!("--{long}"))
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Failed(error)
    }
}

type Outcome = Result<(), Failure>;

/// Runs the program.
pub fn run() -> ExitCode {
    ExitCode::from(run_with(std::env::args_os()))
}

/// Runs the program with arguments, the first of which is its name, and returns the exit status.
///
/// Help texts and usage errors end the process.
pub fn run_with(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments = parse(&arguments.into_iter().collect::<Vec<_>>()).unwrap_or_else(|error| output::exit_with(&error));
    log_to_stderr(drop);
    let handled = interrupt::remove_temporary_files_on_signal().map_err(Failure::Failed);
    let outcome = handled.and_then(|()| dispatch(&arguments.command));
    interrupt::wait_for_signal_handler();
    let (status, message) = match outcome {
        Ok(()) => return 0,
        Err(Failure::Usage(message)) => (2, message),
        Err(Failure::Failed(error)) => (1, error.to_string()),
        Err(Failure::Unhealthy(message)) => (1, message),
    };
    output::print_error(&message);
    status
}

/// Parses the arguments. The error shows their control characters escaped, line ends among them.
fn parse(arguments: &[OsString]) -> Result<Arguments, clap::Error> {
    Arguments::try_parse_from(arguments).map_err(|error| {
        let escaped = arguments.iter().map(|argument| escape_controls(&argument.to_string_lossy(), &[]));
        Arguments::try_parse_from(escaped).err().unwrap_or(error)
    })
}

fn dispatch(command: &Command) -> Outcome {
    match command {
        Command::Synthesize(arguments) => synthesize::run(arguments),
        Command::Sweep(arguments) => sweep::run(arguments),
        Command::Plan(arguments) => plan::run(arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
        Command::Error(arguments) => error::run(arguments),
        Command::Profile(arguments) => profile::run(arguments),
        Command::Verify(arguments) => verify::run(arguments),
        Command::Average(arguments) => average::run(arguments),
        Command::Import(arguments) => import::run(arguments),
        Command::Bench(arguments) => bench::run(arguments),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "posthoc-ema", &mut script);
            output::print(&String::from_utf8_lossy(&script));
            Ok(())
        }
    }
}
