//! `posthoc-ema average`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use posthoc_ema::{AdapterProduct, At, CheckpointOptions, Checkpoints, Merge, OutputForm, ProductErrors, shown};
use serde_json::{Value, json};

use super::args::BlendArgs;
use super::destination::{Destination, output_parser};
use super::form::FormArgs;
use super::list::Numbers;
use super::output::{bytes, print_json, print_report, print_warning};
use super::part::{PartArgs, describe, part_json};
use super::targets::{TargetArgs, target_name, whole_steps};
use super::written::{Written, write_outputs};
use super::{Failure, Outcome};
use crate::tables;

/// Average checkpoints of a training in which nothing was tracked
///
/// Each checkpoint gets the target's mass on the time since the one before it. The command reports the cost of having
/// no more checkpoints: the relative error of the profile, by how many steps the average is later than its target, and
/// how many checkpoints count. All targets are written in one pass. If the checkpoints are folders, so is each average:
/// with the same shards, their index, and the files of configuration and tokenizer, but without the state of the
/// training. Files and folders appear whole or not at all.
#[derive(Args)]
pub struct Arguments {
    /// Checkpoints: safetensors files, indices of shards, folders as Hugging Face's tools write them, files of PyTorch
    /// (no code in them is run); or a single folder of any of these
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// The steps of the checkpoints, in the order of the paths, or of the names in a folder, where epoch2 is before
    /// epoch10: 1000,2000,...,20000 [default: from metadata, trainer_state.json or names]
    #[arg(long, value_name = "LIST")]
    steps: Option<Numbers>,
    /// Entry that holds the model in training checkpoints of PyTorch: a key, or keys that lead to it, joined by dots
    /// [default: found by the names that trainers use]
    #[arg(long, value_name = "NAME")]
    key: Option<String>,
    /// Copy these tensors from the newest checkpoint instead of averaging them: a name or a glob; may be given several
    /// times
    #[arg(long, value_name = "GLOB")]
    copy: Vec<String>,
    /// Leave these tensors, or other entries of the model, out, also of the folder of --like: a name or a glob; may be
    /// given several times
    #[arg(long, value_name = "GLOB")]
    leave_out: Vec<String>,
    /// Average of low-rank adapters (LoRA)
    #[arg(long, value_enum, default_value_t = Product::Factors)]
    product: Product,
    /// Average checkpoints whose config.json or other configurations differ in this setting: keys joined by dots, or a
    /// glob; may be given several times
    #[arg(long, value_name = "KEY")]
    ignore_config: Vec<String>,
    /// Time of the targets; later checkpoints are left out [default: the newest checkpoint]
    #[arg(long, value_name = "STEP")]
    at: Option<u64>,
    /// Write the only target to this file, or to this folder if the checkpoints are folders, or with --like or
    /// --shard-size; - is stdout, by way of a temporary file in $TMPDIR
    #[arg(short, long, value_name = "PATH", conflicts_with = "out_dir", value_parser = output_parser())]
    output: Option<PathBuf>,
    /// Write each target to a file or folder of its own in this directory, which is made if it is missing
    #[arg(long, value_name = "DIR")]
    out_dir: Option<PathBuf>,
    /// Copy configuration, tokenizer and other small files even if they are links that lead out of the checkpoint's
    /// folder; Hugging Face's cache does not need it
    #[arg(long)]
    follow_links: bool,
    /// Only show the weights and what they cost
    #[arg(long, conflicts_with_all = ["output", "out_dir", "part"])]
    plan: bool,
    #[command(flatten)]
    part: PartArgs,
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    blend: BlendArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    targets: TargetArgs,
}

/// Average of the two factors of a low-rank adapter.
#[derive(Clone, Copy, ValueEnum)]
enum Product {
    /// Average each factor; the product of these is not the average of the products
    Factors,
    /// Average the products, each with its scale, and cut them back to their rank; both errors are reported
    Svd,
}

/// Weighs the checkpoints for each target and writes the averages in one pass.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles = arguments.targets.profiles()?;
    check_output(arguments, profiles.len())?;
    arguments.destination().check(arguments.json)?;
    let form = arguments.form.of_checkpoints(&arguments.leave_out)?;
    let options = arguments.options(&form)?;
    let checkpoints = Checkpoints::open_with(&arguments.paths, &options).map_err(Failure::of_argument)?;
    let checkpoints = checkpoints.follow_links(arguments.follow_links);
    let at = arguments.at.map_or(At::Latest, At::Step);
    let merges = checkpoints.plans(&profiles, at).map_err(Failure::of_argument)?;
    let mut notes = checkpoints.notes().to_vec();
    notes.extend(checkpoints.check_form(&merges, &form).map_err(Failure::of_argument)?);
    if !arguments.json {
        notes.iter().for_each(|note| print_report(note));
        merges.iter().filter_map(Merge::warning).for_each(|warning| print_warning(&warning));
    }
    let paths = paths(arguments, checkpoints.are_folders() || form.is_folder(), &merges);
    let written = match arguments.plan {
        true => None,
        false => Some(write(&checkpoints, &merges, &paths, &form, arguments)?),
    };
    let products = merges.iter().map(|merge| checkpoints.product_errors(merge)).collect::<Result<Vec<_>, _>>()?;
    match arguments.json {
        true => print_json(&document(arguments, &notes, &merges, &paths, &products, written)),
        false => show(arguments, &merges, &paths, &products, written),
    }
    Ok(())
}

impl Arguments {
    fn options(&self, form: &OutputForm) -> Result<CheckpointOptions, Failure> {
        Ok(CheckpointOptions {
            steps: self.steps.as_ref().map(whole_steps).transpose()?,
            key: self.key.clone(),
            copy: self.copy.clone(),
            leave_out: self.leave_out.clone(),
            other_names: form.left_out().to_vec(),
            ignore_config: self.ignore_config.clone(),
            product: match self.product {
                Product::Factors => AdapterProduct::Factors,
                Product::Svd => AdapterProduct::Svd,
            },
        })
    }

    fn destination(&self) -> Destination<'_> {
        Destination { output: self.output.as_deref(), out_dir: self.out_dir.as_deref() }
    }
}

/// Checks that the options name an output for every target.
fn check_output(arguments: &Arguments, targets: usize) -> Outcome {
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

/// Returns the file or folder of each target, or nothing if nothing is written.
fn paths(arguments: &Arguments, are_folders: bool, merges: &[Merge]) -> Vec<PathBuf> {
    let Some(dir) = &arguments.out_dir else {
        return arguments.output.iter().cloned().collect();
    };
    let extension = if are_folders { "" } else { ".safetensors" };
    let names = merges.iter().enumerate().map(|(i, merge)| target_name(i, &merge.profile, merge.at));
    names.map(|name| dir.join(format!("{name}{extension}"))).collect()
}

fn write(
    checkpoints: &Checkpoints,
    merges: &[Merge],
    paths: &[PathBuf],
    form: &OutputForm,
    arguments: &Arguments,
) -> Result<Written, Failure> {
    let outputs: Vec<(&Merge, &Path)> = merges.iter().zip(paths.iter().map(PathBuf::as_path)).collect();
    write_outputs(
        checkpoints.bytes_to_read(merges),
        "averaging",
        &arguments.blend,
        arguments.part.part,
        |options| checkpoints.write_as(&outputs, form, options),
        |options, part| checkpoints.write_part(&outputs, form, options, part),
    )
}

/// Prints a row for each target, the weights of a single one, and what was written.
fn show(
    arguments: &Arguments,
    merges: &[Merge],
    paths: &[PathBuf],
    products: &[Option<ProductErrors>],
    written: Option<Written>,
) {
    let destination = arguments.destination();
    destination.print(&tables::merges(merges).to_string());
    if let [merge] = merges {
        destination.print(&tables::checkpoint_weights(merge).to_string());
    }
    for (merge, errors) in merges.iter().zip(products) {
        errors.iter().for_each(|errors| destination.print(&product_line(merge, errors)));
    }
    let Some(Written { bytes: read, seconds, device, part }) = written else { return };
    let names: Vec<String> = paths.iter().map(shown).collect();
    let why = arguments.blend.why_not_cuda();
    if part.as_ref().is_none_or(|outcome| outcome.missing.is_empty()) {
        destination.print(&format!("written: {}", names.join(", ")));
    }
    if let Some(device) = device {
        destination.print(&format!("{} of checkpoints read in {seconds:.2} s, blended on {device}{why}", bytes(read)));
    }
    if let (Some(part), Some(outcome)) = (arguments.part.part, &part) {
        destination.print(&describe(part, outcome));
    }
}

/// Returns the errors of an average of adapters.
fn product_line(merge: &Merge, errors: &ProductErrors) -> String {
    let ProductErrors { pairs, truncation_error, factors_error } = errors;
    format!(
        "{}: products of {pairs} adapters off by {truncation_error:.2e}, cut back to their rank; by \
         {factors_error:.2e} if the factors were averaged",
        merge.profile
    )
}

fn document(
    arguments: &Arguments,
    notes: &[String],
    merges: &[Merge],
    paths: &[PathBuf],
    products: &[Option<ProductErrors>],
    written: Option<Written>,
) -> Value {
    let mut targets = json!(merges);
    let each = targets.as_array_mut().into_iter().flatten();
    each.zip(paths).for_each(|(target, path)| target["path"] = json!(path));
    let each = targets.as_array_mut().into_iter().flatten();
    for (target, errors) in each.zip(products) {
        errors.iter().for_each(|errors| target["product"] = json!(errors));
    }
    let warnings: Vec<String> = merges.iter().filter_map(Merge::warning).collect();
    let mut document = json!({ "targets": targets, "notes": notes, "warnings": warnings });
    if let Some(Written { bytes, seconds, device, part }) = written {
        document["bytes_read"] = bytes.into();
        document["seconds"] = seconds.into();
        document["device"] = device.map(|device| device.to_string()).into();
        if let (Some(part), Some(outcome)) = (arguments.part.part, &part) {
            document["part"] = part_json(part, outcome);
        }
    }
    document
}
