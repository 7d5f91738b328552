//! The command line `posthoc-ema`: arguments in, calls to the library, tables or JSON out.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
