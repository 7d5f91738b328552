//! `posthoc-ema average`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::report;
use clap::Args;
use posthoc_ema::{At, Checkpoints, Device, Merge, WriteOptions};
use serde_json::{Value, json};

use super::args::{Blending, Targets};
use super::list::Numbers;
use super::output::{byte_bar, bytes, print, print_json, tell};
use super::synthesize::{target_name, why_not_cuda};
use super::{Failure, Outcome, targets};

/// Average checkpoints of a training in which nothing was tracked
///
/// Each checkpoint gets the target's mass on the time since the one before it; what it costs that there are no more of them
/// is told: the relative error of the profile, by how many steps the average is later than its target, and how many
/// checkpoints count. All targets are written in one pass. Where the checkpoints are folders, so is each average: with the
/// same shards, their index, and the files of configuration and tokenizer, but without the state of the training. Files and
/// folders appear whole or not at all.
#[derive(Args)]
pub struct Arguments {
    /// Checkpoints: safetensors files, indices of shards, folders as Hugging Face's tools write them, files of PyTorch (no
    /// code in them is run); or a single folder of any of these
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// The steps of the checkpoints, in the order of the paths, or of the names in a folder, where epoch2 is before epoch10:
    /// 1000,2000,...,20000 [default: from metadata, trainer_state.json or names]
    #[arg(long, value_name = "LIST")]
    pub steps: Option<Numbers>,
    /// Time of the targets; later checkpoints are left out [default: the newest checkpoint]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
    /// Write the only target to this file, or this folder where the checkpoints are folders
    #[arg(short, long, value_name = "PATH", conflicts_with = "out_dir")]
    pub output: Option<PathBuf>,
    /// Write each target to a file or folder of its own in this directory, which is made where it is missing
    #[arg(long, value_name = "DIR")]
    pub out_dir: Option<PathBuf>,
    /// Only show the weights and what they cost
    #[arg(long, conflicts_with_all = ["output", "out_dir"])]
    pub plan: bool,
    #[command(flatten)]
    pub blending: Blending,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub targets: Targets,
}

/// Weighs the checkpoints for each target and writes the averages in one pass.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles = arguments.targets.profiles()?;
    check(arguments, profiles.len())?;
    let steps = arguments.steps.as_ref().map(steps).transpose()?;
    let checkpoints = Checkpoints::open(&arguments.paths, steps.as_deref()).map_err(targets::usage)?;
    let merges = checkpoints.plans(&profiles, arguments.at.map_or(At::Latest, At::Step)).map_err(targets::usage)?;
    let warnings: Vec<String> = merges.iter().filter_map(Merge::warning).collect();
    if !arguments.json {
        warnings.iter().for_each(|warning| tell(&format!("warning: {warning}")));
    }
    let paths = paths(arguments, &checkpoints, &merges);
    let written = match arguments.plan {
        true => None,
        false => Some(write(&checkpoints, &merges, &paths, arguments)?),
    };
    match arguments.json {
        true => print_json(&document(&merges, &paths, &warnings, written)),
        false => show(arguments, &merges, &paths, written),
    }
    Ok(())
}

/// Checks that there is somewhere to write to.
fn check(arguments: &Arguments, targets: usize) -> Outcome {
    if arguments.output.is_some() && targets > 1 {
        let why = format!("-o names one average, and there are {targets} targets: use --out-dir DIR");
        return Err(Failure::Usage(why));
    }
    if arguments.output.is_none() && arguments.out_dir.is_none() && !arguments.plan {
        let why =
            "nowhere to write to: give -o PATH, --out-dir DIR for several targets, or --plan to see the weights only";
        return Err(Failure::Usage(why.into()));
    }
    Ok(())
}

/// The steps that were given, as whole numbers.
fn steps(list: &Numbers) -> Result<Vec<u64>, Failure> {
    // Beyond, an f64 does not hold every whole number.
    let whole = |&step: &f64| match step >= 1.0 && step <= 2f64.powi(53) && step.fract() == 0.0 {
        true => Ok(step as u64),
        false => Err(Failure::Usage(format!("--steps: {step} is no step: they are whole numbers above 0"))),
    };
    list.0.iter().map(whole).collect()
}

/// One file or folder for each target; none where nothing is written.
fn paths(arguments: &Arguments, checkpoints: &Checkpoints, merges: &[Merge]) -> Vec<PathBuf> {
    let Some(dir) = &arguments.out_dir else {
        return arguments.output.iter().cloned().collect();
    };
    let ending = if checkpoints.are_folders() { "" } else { ".safetensors" };
    let name = |(i, merge): (usize, &Merge)| format!("{}{ending}", target_name(i, &merge.profile, merge.at));
    merges.iter().enumerate().map(|target| dir.join(name(target))).collect()
}

/// What was done: bytes read, seconds, and the device it took.
struct Written {
    bytes: u64,
    seconds: f64,
    device: Device,
}

fn write(
    checkpoints: &Checkpoints,
    merges: &[Merge],
    paths: &[PathBuf],
    arguments: &Arguments,
) -> Result<Written, Failure> {
    let outputs: Vec<(&Merge, &Path)> = merges.iter().zip(paths.iter().map(PathBuf::as_path)).collect();
    let bytes = checkpoints.bytes_to_read(merges);
    let bar = byte_bar(bytes, "averaging");
    let progress = |bytes| bar.inc(bytes);
    let options = WriteOptions {
        dtype: arguments.blending.dtype(),
        device: arguments.blending.device,
        progress: Some(&progress),
    };
    let start = Instant::now();
    let device = checkpoints.write(&outputs, &options);
    bar.finish_and_clear();
    Ok(Written { bytes, device: device?, seconds: start.elapsed().as_secs_f64() })
}

/// Prints what each target is like, a single one with the weights, and what was written.
fn show(arguments: &Arguments, merges: &[Merge], paths: &[PathBuf], written: Option<Written>) {
    print(&report::merges(merges).to_string());
    if let [merge] = merges {
        print(&report::checkpoint_weights(merge).to_string());
    }
    if let Some(Written { bytes: read, seconds, device }) = written {
        let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        let why = why_not_cuda(arguments.blending.device);
        print(&format!("written: {}", names.join(", ")));
        print(&format!("{} of checkpoints read in {seconds:.2} s, blended on {device}{why}", bytes(read)));
    }
}

fn document(merges: &[Merge], paths: &[PathBuf], warnings: &[String], written: Option<Written>) -> Value {
    let mut targets = json!(merges);
    let each = targets.as_array_mut().into_iter().flatten();
    each.zip(paths).for_each(|(target, path)| target["path"] = json!(path));
    let mut document = json!({ "targets": targets, "warnings": warnings });
    if let Some(Written { bytes, seconds, device }) = written {
        document["bytes_read"] = bytes.into();
        document["seconds"] = seconds.into();
        document["device"] = device.to_string().into();
    }
    document
}
