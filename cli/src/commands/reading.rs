//! How commands open a run.

use std::path::Path;

use clap::Args;
use posthoc_ema::{Plan, Run};

use super::Failure;
use super::output::{byte_bar, spinner, tell};

/// What is done about damaged snapshots.
#[derive(Args)]
pub struct Reading {
    /// Go on without snapshots that are damaged: every byte of the run is read first, and what is whole is planned with
    #[arg(long, requires = "run")]
    pub skip_damaged: bool,
}

impl Reading {
    /// Opens a run, and tells what was left out, which is said on stderr, too.
    pub fn open(&self, path: &Path) -> Result<(Run, Vec<String>), Failure> {
        if !self.skip_damaged {
            return Ok((Run::open(path)?, Vec::new()));
        }
        let spinner = spinner(format!("verifying {}", path.display()));
        let opened = Run::open_sound(path, &mut |bytes| spinner.inc(bytes));
        spinner.finish_and_clear();
        let (run, damaged) = opened?;
        let left_out: Vec<String> = damaged.iter().map(ToString::to_string).collect();
        left_out.iter().for_each(|why| tell(&format!("warning: left out: {why}")));
        Ok((run, left_out))
    }
}

/// Reads what the plans blend, and compares checksums.
pub fn verify(run: &Run, plans: &[Plan]) -> Result<(), Failure> {
    let bar = byte_bar(run.bytes_to_read(plans), "verifying");
    let verified = run.verify_used(plans, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    Ok(verified?)
}
