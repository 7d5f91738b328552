//! The commands.

mod advise;
mod args;
mod average;
mod bench;
mod error;
mod import;
mod inspect;
mod interrupt;
mod list;
mod output;
mod picture;
mod plan;
mod profile;
mod reading;
mod subject;
mod sweep;
mod synthesize;
mod table;
mod targets;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Arguments, Command};

/// Why a command did not succeed.
enum Failure {
    /// The arguments make no sense together or have values out of range: exit status 2.
    Usage(String),
    /// It was asked for something sensible that failed: exit status 1.
    Failed(posthoc_ema::Error),
    /// A table or document already says what is wrong: exit status 1.
    Unhealthy(String),
}

impl From<posthoc_ema::Error> for Failure {
    fn from(error: posthoc_ema::Error) -> Failure {
        Failure::Failed(error)
    }
}

type Outcome = Result<(), Failure>;

/// Runs the program.
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    interrupt::clear_up();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::WARN)
        .with_target(false)
        .without_time()
        .init();
    let outcome = dispatch(&arguments.command);
    interrupt::wait_for_end();
    let (status, message) = match outcome {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => (2, message),
        Err(Failure::Failed(error)) => (1, error.to_string()),
        Err(Failure::Unhealthy(message)) => (1, message),
    };
    output::tell(&format!("error: {message}"));
    ExitCode::from(status)
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
