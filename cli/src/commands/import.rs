//! `posthoc-ema import`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use posthoc_ema::{Import, ImportReport, Profile, Tool, shown};
use serde_json::json;

use super::list::Numbers;
use super::output::{byte_bar, bytes, print, print_json, print_warning};
use super::targets::profiles;
use super::{Failure, Outcome};

/// Write another tool's checkpoints as a run
///
/// pytorch-posthoc-ema, ema-pytorch and nitrous-ema apply a step's decay once every --update-every steps, and then
/// synthesize as if they had applied it at every step. Their averages are sound, but of other profiles than asked for.
/// The run records the profiles that they really have, so that a synthesis from it gives the lengths that theirs should
/// have given. The checkpoints are only read, and no code is ever run. The options say what the training used: the
/// files do not record it.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the checkpoints (INDEX.STEP.pt)
    dir: PathBuf,
    /// Directory of the run: an empty or a new one
    run: PathBuf,
    /// The tool that wrote them
    #[arg(long, value_enum, value_name = "TOOL")]
    from: ToolName,
    /// Profiles that it tracked, in its order, by relative standard deviation
    #[arg(long, value_name = "LIST", allow_negative_numbers = true, required_unless_present = "gammas")]
    sigma_rels: Option<Numbers>,
    /// The same by exponent
    #[arg(long, value_name = "LIST", allow_negative_numbers = true, conflicts_with = "sigma_rels")]
    gammas: Option<Numbers>,
    /// Its steps between updates (the default of pytorch-posthoc-ema is 10, that of the others 100)
    #[arg(long, value_name = "N")]
    update_every: u64,
    /// No update before this step [default: 100 for pytorch-posthoc-ema, as there; give 0 for its versions 1.0.6 and
    /// 1.0.7, which have no such option]
    #[arg(long, value_name = "STEP")]
    update_after_step: Option<u64>,
    /// nitrous-ema was made with step_size_correction=True
    #[arg(long)]
    step_size_correction: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum ToolName {
    PytorchPosthocEma,
    EmaPytorch,
    NitrousEma,
}

impl From<ToolName> for Tool {
    fn from(name: ToolName) -> Tool {
        match name {
            ToolName::PytorchPosthocEma => Tool::PytorchPosthocEma,
            ToolName::EmaPytorch => Tool::EmaPytorch,
            ToolName::NitrousEma => Tool::NitrousEma,
        }
    }
}

/// Writes another tool's checkpoints as a run.
pub fn run(arguments: &Arguments) -> Outcome {
    let import = options(arguments)?;
    import.check().map_err(Failure::of_argument)?;
    let bar = byte_bar(total_bytes(&arguments.dir), "importing");
    let start = Instant::now();
    let imported = import.write(&arguments.dir, &arguments.run, Some(&|bytes| bar.inc(bytes)));
    bar.finish_and_clear();
    let imported = imported?;
    let seconds = start.elapsed().as_secs_f64();
    if arguments.json {
        print_json(&document(arguments, &imported, seconds));
        return Ok(());
    }
    imported.warnings.iter().for_each(|warning| print_warning(warning));
    print(&summary(arguments, &imported, seconds));
    Ok(())
}

fn options(arguments: &Arguments) -> Result<Import, Failure> {
    let profiles = profiles(arguments.sigma_rels.as_slice(), Profile::sigma_rel)
        .chain(profiles(arguments.gammas.as_slice(), Profile::gamma));
    Ok(Import {
        from: arguments.from.into(),
        profiles: profiles.collect::<Result<_, _>>()?,
        update_every: arguments.update_every,
        update_after_step: arguments.update_after_step,
        step_size_correction: arguments.step_size_correction,
    })
}

/// Returns the bytes of all checkpoints, for the bar. The import reports what cannot be read.
fn total_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let checkpoints = entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "pt"));
    checkpoints.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

fn summary(arguments: &Arguments, imported: &ImportReport, seconds: f64) -> String {
    let names: Vec<String> = imported.profiles.iter().map(ToString::to_string).collect();
    let steps = match imported.steps.as_slice() {
        [first, .., last] => format!("{} steps ({first} to {last})", imported.steps.len()),
        steps => format!("{} step ({})", steps.len(), steps.first().unwrap_or(&0)),
    };
    format!(
        "{} snapshots of {} at {steps} written to {}: {} in {seconds:.2} s",
        imported.snapshots,
        names.join(", "),
        shown(&arguments.run),
        bytes(imported.bytes)
    )
}

fn document(arguments: &Arguments, imported: &ImportReport, seconds: f64) -> serde_json::Value {
    json!({
        "run": arguments.run,
        "snapshots": imported.snapshots,
        "steps": imported.steps,
        "profiles": imported.profiles,
        "bytes_written": imported.bytes,
        "warnings": imported.warnings,
        "seconds": seconds,
    })
}
