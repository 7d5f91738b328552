//! `posthoc-ema verify`.

use std::path::{Path, PathBuf};

use clap::Args;
use posthoc_ema::snapshot;
use posthoc_ema::{VerifyReport, shown};
use serde_json::json;

use super::inspect::{aside_json, left_course};
use super::output::{byte_bar, bytes, print, print_json};
use super::{Failure, Outcome};

/// Read every file of a run and check its checksum
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    run: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Reads every file of a run and prints what is damaged.
pub fn run(arguments: &Arguments) -> Outcome {
    let bar = byte_bar(total_bytes(&arguments.run), "verifying");
    let verified = posthoc_ema::verify(&arguments.run, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let VerifyReport { files, bytes: read, findings } = verified?;
    let findings: Vec<String> = findings.iter().map(ToString::to_string).collect();
    if arguments.json {
        let aside = aside_json(&arguments.run);
        print_json(&json!({ "files": files, "bytes": read, "damaged": findings, "aside": aside }));
    } else {
        findings.iter().for_each(|line| print(line));
        snapshot::set_aside(&arguments.run)?.iter().for_each(|left| print(&left_course(left)));
        print(&format!("{files} files ({} read), {} findings", bytes(read), findings.len()));
    }
    if findings.is_empty() {
        return Ok(());
    }
    Err(Failure::Unhealthy(format!("{}: {} findings", shown(&arguments.run), findings.len())))
}

/// Returns about how many bytes there are to read, for the bar.
fn total_bytes(run: &Path) -> u64 {
    let entries = std::fs::read_dir(run).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}
