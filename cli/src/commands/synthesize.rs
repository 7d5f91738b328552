//! `posthoc-ema synthesize`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::report;
use clap::Args;
use posthoc_ema::{At, Device, Error, Output, Plan, Profile, Run, WriteOptions, cuda_devices};
use serde_json::json;

use super::args::{Blending, Rounding, Targets};
use super::output::{byte_bar, bytes, print, print_json};
use super::reading::{self, Reading};
use super::{Failure, Outcome};

/// Synthesize averages from a run's snapshots
///
/// Up to 256 targets are synthesized in one pass over the snapshots. Files appear whole or not at all.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    pub run: PathBuf,
    /// Time of the targets [default: the newest snapshot]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
    /// Write the only target to this file
    #[arg(short, long, value_name = "FILE", conflicts_with = "out_dir")]
    pub output: Option<PathBuf>,
    /// Write each target to a file of its own in this directory, which is made where it is missing
    #[arg(long, value_name = "DIR")]
    pub out_dir: Option<PathBuf>,
    /// Read every snapshot that is blended once more beforehand, and compare its checksum
    #[arg(long, conflicts_with = "skip_damaged")]
    pub verify: bool,
    #[command(flatten)]
    pub reading: Reading,
    #[command(flatten)]
    pub blending: Blending,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub rounding: Rounding,
    #[command(flatten)]
    pub targets: Targets,
}

/// Solves the targets, blends them in one pass and writes a file for each.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles = arguments.targets.profiles()?;
    if arguments.output.is_some() && profiles.len() > 1 {
        let why = format!("-o names one file, and there are {} targets: use --out-dir DIR", profiles.len());
        return Err(Failure::Usage(why));
    }
    if arguments.output.is_none() && arguments.out_dir.is_none() {
        return Err(Failure::Usage("nowhere to write to: give -o FILE, or --out-dir DIR for several targets".into()));
    }
    let (run, left_out) = arguments.reading.open(&arguments.run)?;
    let plans = run.plans_with(&profiles, arguments.at.map_or(At::Latest, At::Step), arguments.rounding.noise)?;
    if arguments.verify {
        reading::verify(&run, &plans)?;
    }
    let paths = paths(arguments, &plans)?;
    let (seconds, device) = write(&run, &plans, &paths, arguments)?;
    let read = run.bytes_to_read(&plans);
    if arguments.json {
        let targets: Vec<_> = plans.iter().zip(&paths).map(|(plan, path)| target_json(plan, path)).collect();
        let mut document =
            json!({ "targets": targets, "bytes_read": read, "seconds": seconds, "device": device.to_string() });
        if arguments.reading.skip_damaged {
            document["left_out"] = json!(left_out);
        }
        print_json(&document);
        return Ok(());
    }
    print(&table(&plans, &paths).to_string());
    let why = why_not_cuda(arguments.blending.device);
    print(&format!("{} of snapshots read in {seconds:.2} s, blended on {device}{why}", bytes(read)));
    Ok(())
}

/// What was written, and how good it is to be expected.
fn table(plans: &[Plan], paths: &[PathBuf]) -> report::Table {
    let header = ["file", "target", "at", "relative error", "noise gain"];
    let mut table = report::table(&[&header[..], report::predicted_header(plans)].concat());
    for (plan, path) in plans.iter().zip(paths) {
        let figures = [report::number(plan.relative_error), report::number(plan.noise_gain)];
        let about = [path.display().to_string(), plan.profile.to_string(), plan.at.to_string()];
        table.add_row(about.into_iter().chain(figures).chain(report::predicted(plan)));
    }
    table
}

/// Where the choice was free in a program that has CUDA: why there was none.
pub(super) fn why_not_cuda(asked: Device) -> String {
    let looked = cfg!(feature = "cuda") && asked == Device::Auto;
    cuda_devices().err().filter(|_| looked).map_or(String::new(), |why| format!(": {why}"))
}

/// One file for each target.
fn paths(arguments: &Arguments, plans: &[Plan]) -> Result<Vec<PathBuf>, Failure> {
    let Some(dir) = &arguments.out_dir else {
        return Ok(arguments.output.iter().cloned().collect());
    };
    std::fs::create_dir_all(dir)
        .map_err(|source| Failure::Failed(Error::Io { action: "create", path: dir.clone(), source }))?;
    Ok(plans.iter().enumerate().map(|(i, plan)| dir.join(file_name(i, plan))).collect())
}

/// `sigma_rel-0.15.step-20000.safetensors`.
fn file_name(i: usize, plan: &Plan) -> String {
    format!("{}.safetensors", target_name(i, &plan.profile, plan.at))
}

/// `sigma_rel-0.15.step-20000`: the target as a name; tables, which have no name, by their number.
pub(super) fn target_name(i: usize, profile: &Profile, at: u64) -> String {
    let target = profile.to_string().replace(' ', "-");
    let number = if target.starts_with("table") { format!("-{}", i + 1) } else { String::new() };
    format!("{target}{number}.step-{at}")
}

/// Writes all files; returns the seconds and the device it took.
fn write(run: &Run, plans: &[Plan], paths: &[PathBuf], arguments: &Arguments) -> Result<(f64, Device), Failure> {
    let outputs: Vec<Output<'_>> = plans.iter().zip(paths).map(|(plan, path)| Output { plan, path }).collect();
    let bar = byte_bar(run.bytes_to_read(plans), "synthesizing");
    let progress = |bytes| bar.inc(bytes);
    let start = Instant::now();
    let dtype = arguments.blending.dtype();
    let device =
        run.write_all(&outputs, &WriteOptions { dtype, device: arguments.blending.device, progress: Some(&progress) })?;
    bar.finish_and_clear();
    Ok((start.elapsed().as_secs_f64(), device))
}

fn target_json(plan: &Plan, path: &Path) -> serde_json::Value {
    json!({
        "path": path,
        "profile": plan.profile,
        "at": plan.at,
        "relative_error": plan.relative_error,
        "noise_gain": plan.noise_gain,
        "rho": plan.rho,
        "predicted": plan.predicted,
    })
}
