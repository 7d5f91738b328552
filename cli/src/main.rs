//! The program `posthoc-ema`.

use std::process::ExitCode;

fn main() -> ExitCode {
    posthoc_ema::install_sigbus_handler();
    posthoc_ema_cli::run()
}
