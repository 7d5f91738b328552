//! Opening and verifying a run.

use std::path::Path;

use clap::Args;
use posthoc_ema::{Plan, Run, shown};

use super::Failure;
use super::output::{byte_bar, print_warning, spinner};

/// Treatment of damaged snapshots.
#[derive(Args)]
pub struct OpenArgs {
    /// Go on without snapshots that are damaged: every byte of the run is read first, and what is whole is planned with
    #[arg(long, requires = "run")]
    pub skip_damaged: bool,
}

impl OpenArgs {
    /// Opens a run. Returns the reasons of the snapshots that were left out, which are printed as warnings, too.
    pub fn open(&self, path: &Path) -> Result<(Run, Vec<String>), Failure> {
        if !self.skip_damaged {
            return Ok((Run::open(path)?, Vec::new()));
        }
        let spinner = spinner(format!("verifying {}", shown(path)));
        let opened = Run::open_sound(path, &mut |bytes| spinner.inc(bytes));
        spinner.finish_and_clear();
        let (run, damaged) = opened?;
        let left_out: Vec<String> = damaged.iter().map(ToString::to_string).collect();
        left_out.iter().for_each(|why| print_warning(&format!("left out: {why}")));
        Ok((run, left_out))
    }
}

/// Reads the snapshots that the plans blend, and compares their checksums.
pub fn verify(run: &Run, plans: &[Plan]) -> Result<(), Failure> {
    let bar = byte_bar(run.bytes_to_read(plans), "verifying");
    let verified = run.verify_used(plans, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    Ok(verified?)
}
