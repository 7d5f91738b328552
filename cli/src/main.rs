//! The program `posthoc-ema`.

use std::process::ExitCode;

fn main() -> ExitCode {
    posthoc_ema_cli::run()
}
