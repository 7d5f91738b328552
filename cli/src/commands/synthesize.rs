//! `posthoc-ema synthesize`.

use std::path::{Path, PathBuf};

use clap::Args;
use comfy_table::Table;
use posthoc_ema::{Error, Output, OutputForm, Plan, Run, shown};
use serde_json::{Value, json};

use super::args::{AtArgs, BlendArgs, NoiseArgs};
use super::destination::{Destination, output_parser};
use super::form::{FormArgs, LikeArgs};
use super::open::{self, OpenArgs};
use super::output::{bytes, print_json, print_report, print_warnings};
use super::part::{PartArgs, describe, part_json};
use super::targets::{TargetArgs, target_name};
use super::written::{Written, write_outputs};
use super::{Failure, Outcome};
use crate::numbers::number;
use crate::tables::{self, predicted, predicted_header};

/// Synthesize averages from a run's snapshots
///
/// Up to 256 targets are synthesized in one pass over the snapshots. Files and folders appear whole or not at all. With
/// --like, an average is a folder that the model's own library loads: AutoModel.from_pretrained.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    run: PathBuf,
    #[command(flatten)]
    at: AtArgs,
    /// Write the only target to this file, or to this folder with --like or --shard-size; - is stdout, by way of a
    /// temporary file in $TMPDIR
    #[arg(short, long, value_name = "PATH", conflicts_with = "out_dir", value_parser = output_parser())]
    output: Option<PathBuf>,
    /// Write each target to a file or folder of its own in this directory, which is made if it is missing
    #[arg(long, value_name = "DIR")]
    out_dir: Option<PathBuf>,
    /// Read every snapshot that is blended and compare its checksum before the synthesis
    #[arg(long, conflicts_with = "skip_damaged")]
    verify: bool,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    like: LikeArgs,
    #[command(flatten)]
    part: PartArgs,
    #[command(flatten)]
    blend: BlendArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    noise: NoiseArgs,
    #[command(flatten)]
    targets: TargetArgs,
}

/// Solves the targets, blends them in one pass and writes a file for each.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles = arguments.targets.profiles()?;
    check_output(arguments, profiles.len())?;
    arguments.destination().check(arguments.json)?;
    let form = arguments.form.of_run(&arguments.like)?;
    let (run, left_out) = arguments.open.open(&arguments.run)?;
    let plans = run.plans_with(&profiles, arguments.at.at(), arguments.noise.noise)?;
    print_warnings(&plans);
    let notes = run.check_form(&plans, &form).map_err(Failure::of_argument)?;
    if !arguments.json {
        notes.iter().for_each(|note| print_report(note));
    }
    if arguments.verify {
        open::verify(&run, &plans)?;
    }
    let paths = paths(arguments, &form, &plans)?;
    let Written { bytes: read, seconds, device, part } = write(&run, &plans, &paths, &form, arguments)?;
    let part = arguments.part.part.zip(part);
    if arguments.json {
        let targets: Vec<Value> = plans.iter().zip(&paths).map(|(plan, path)| target_json(plan, path)).collect();
        let device = device.map(|device| device.to_string());
        let mut document = json!({ "targets": targets, "bytes_read": read, "seconds": seconds, "device": device });
        document["notes"] = json!(notes);
        if let Some((part, outcome)) = &part {
            document["part"] = part_json(*part, outcome);
        }
        if arguments.open.skip_damaged {
            document["left_out"] = json!(left_out);
        }
        print_json(&document);
        return Ok(());
    }
    let why = arguments.blend.why_not_cuda();
    let destination = arguments.destination();
    destination.print(&table(&plans, &paths).to_string());
    if let Some(groups) = tables::worst_groups(&plans) {
        destination.print(&groups.to_string());
    }
    plans.iter().filter_map(tables::held_back).for_each(|text| destination.print(&text));
    if let Some(later) = tables::later(&plans) {
        destination.print(&later.to_string());
    }
    if let Some(device) = device {
        destination.print(&format!("{} of snapshots read in {seconds:.2} s, blended on {device}{why}", bytes(read)));
    }
    if let Some((part, outcome)) = &part {
        destination.print(&describe(*part, outcome));
    }
    Ok(())
}

impl Arguments {
    fn destination(&self) -> Destination<'_> {
        Destination { output: self.output.as_deref(), out_dir: self.out_dir.as_deref() }
    }
}

/// Checks that the options name an output for every target.
fn check_output(arguments: &Arguments, targets: usize) -> Outcome {
    if arguments.output.is_some() && targets > 1 {
        let why = format!("-o names one file, and there are {targets} targets: use --out-dir DIR");
        return Err(Failure::Usage(why));
    }
    if arguments.output.is_none() && arguments.out_dir.is_none() {
        return Err(Failure::Usage("nowhere to write to: give -o FILE, or --out-dir DIR for several targets".into()));
    }
    Ok(())
}

/// Lists the written files with the errors of their plans.
fn table(plans: &[Plan], paths: &[PathBuf]) -> Table {
    let header = ["file", "target", "at", "relative error", "noise gain"];
    let mut table = tables::table(&[&header[..], predicted_header(plans)].concat());
    for (plan, path) in plans.iter().zip(paths) {
        let target = [shown(path), plan.profile.to_string(), plan.at.to_string()];
        let errors = [plan.relative_error, plan.noise_gain].map(number);
        table.add_row(target.into_iter().chain(errors).chain(predicted(plan)));
    }
    table
}

/// Returns the file of each target, in a directory that is made if it is missing.
fn paths(arguments: &Arguments, form: &OutputForm, plans: &[Plan]) -> Result<Vec<PathBuf>, Failure> {
    let Some(dir) = &arguments.out_dir else {
        return Ok(arguments.output.iter().cloned().collect());
    };
    std::fs::create_dir_all(dir)
        .map_err(|source| Failure::Failed(Error::Io { action: "create", path: dir.clone(), source }))?;
    let names = plans.iter().enumerate().map(|(i, plan)| target_name(i, &plan.profile, plan.at));
    let extension = if form.is_folder() { "" } else { ".safetensors" };
    Ok(names.map(|name| dir.join(format!("{name}{extension}"))).collect())
}

/// Writes all files, or a part of them.
fn write(
    run: &Run,
    plans: &[Plan],
    paths: &[PathBuf],
    form: &OutputForm,
    arguments: &Arguments,
) -> Result<Written, Failure> {
    let outputs: Vec<Output<'_>> = plans.iter().zip(paths).map(|(plan, path)| Output { plan, path }).collect();
    write_outputs(
        run.bytes_to_read(plans),
        "synthesizing",
        &arguments.blend,
        arguments.part.part,
        |options| run.write_as(&outputs, form, options),
        |options, part| run.write_part(&outputs, form, options, part),
    )
}

fn target_json(plan: &Plan, path: &Path) -> Value {
    let mut target = json!({
        "path": path,
        "profile": plan.profile,
        "at": plan.at,
        "relative_error": plan.relative_error,
        "noise_gain": plan.noise_gain,
        "rho": plan.rho,
        "predicted": plan.predicted,
        "no_prediction": plan.no_prediction,
        "event": plan.event,
        "worst_group": plan.worst_group,
        "warning": plan.shortfall,
    });
    if let Some(held_back) = &plan.held_back {
        target["held_back"] = json!(held_back);
    }
    if !plan.later.is_empty() {
        target["later"] = json!(plan.later);
    }
    target
}
