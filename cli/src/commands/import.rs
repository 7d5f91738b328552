//! `posthoc-ema import`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use posthoc_ema::{AverageDecay, Import, ImportAverages, ImportReport, Profile, Tool, shown};
use serde_json::json;

use super::import_averages::{AveragesArgs, ImportPaths};
use super::list::Numbers;
use super::output::{byte_bar, bytes, print, print_json, print_warning};
use super::targets::profiles;
use super::{Failure, Outcome};

/// Write another tool's checkpoints as a run
///
/// pytorch-posthoc-ema, ema-pytorch and nitrous-ema apply a step's decay once every --update-every steps, and then
/// synthesize as if they had applied it at every step. Their averages are sound, but of other profiles than asked for.
/// The run records the profiles that they really have, so that a synthesis from it gives the lengths that theirs should
/// have given. With --from averages, the files are any series of checkpoints that hold an EMA of a known decay, and raw
/// weights beside it. The checkpoints are only read, and no code is ever run. The options say what the training used:
/// most files do not record it.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the checkpoints (INDEX.STEP.pt, or with --from averages any files and folders of weights)
    dir: PathBuf,
    /// Directory of the run: an empty or a new one
    run: PathBuf,
    /// The tool that wrote them, or averages for those that a training kept
    #[arg(long, value_enum, value_name = "TOOL")]
    from: ToolName,
    /// Profiles that it tracked, in its order, by relative standard deviation
    #[arg(long, value_name = "LIST", allow_negative_numbers = true, alias = "sigma-rel")]
    sigma_rels: Option<Numbers>,
    /// The same by exponent
    #[arg(long, value_name = "LIST", allow_negative_numbers = true, conflicts_with = "sigma_rels", alias = "gamma")]
    gammas: Option<Numbers>,
    /// Its steps between updates (the default of pytorch-posthoc-ema is 10, that of the others 100) [default for
    /// averages of a known tool: 1]
    #[arg(long, value_name = "N")]
    update_every: Option<u64>,
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
    #[command(flatten)]
    averages: AveragesArgs,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum ToolName {
    PytorchPosthocEma,
    EmaPytorch,
    NitrousEma,
    Averages,
}

impl ToolName {
    /// Returns the tool; `None` for averages that a training kept.
    fn tool(self) -> Option<Tool> {
        match self {
            ToolName::PytorchPosthocEma => Some(Tool::PytorchPosthocEma),
            ToolName::EmaPytorch => Some(Tool::EmaPytorch),
            ToolName::NitrousEma => Some(Tool::NitrousEma),
            ToolName::Averages => None,
        }
    }
}

/// Writes another tool's checkpoints as a run.
pub fn run(arguments: &Arguments) -> Outcome {
    let (imported, seconds) = match arguments.from.tool() {
        Some(tool) => import_tool(arguments, tool)?,
        None => import_averages(arguments)?,
    };
    if arguments.json {
        print_json(&document(arguments, &imported, seconds));
        return Ok(());
    }
    imported.warnings.iter().for_each(|warning| print_warning(warning));
    print(&summary(arguments, &imported, seconds));
    Ok(())
}

/// Writes checkpoints of a tool as a run. Returns the summary and the seconds that it took.
fn import_tool(arguments: &Arguments, tool: Tool) -> Result<(ImportReport, f64), Failure> {
    let import = options(arguments, tool)?;
    import.check().map_err(Failure::of_argument)?;
    let bar = byte_bar(total_bytes(&arguments.dir), "importing");
    let start = Instant::now();
    let imported = import.write(&arguments.dir, &arguments.run, Some(&|bytes| bar.inc(bytes)));
    bar.finish_and_clear();
    Ok((imported?, start.elapsed().as_secs_f64()))
}

/// Writes averages that a training kept as a run. Returns the summary and the seconds that it took.
fn import_averages(arguments: &Arguments) -> Result<(ImportReport, f64), Failure> {
    if arguments.step_size_correction {
        return Err(Failure::Usage("--step-size-correction is for --from nitrous-ema: leave it out".into()));
    }
    let common = ImportAverages {
        decays: powers(arguments)?.into_iter().map(AverageDecay::Power).collect(),
        update_every: arguments.update_every,
        update_after_step: arguments.update_after_step,
        ..Default::default()
    };
    let paths = ImportPaths { dir: &arguments.dir, run: &arguments.run, notes: !arguments.json };
    arguments.averages.import(&paths, common)
}

/// Returns the power-function profiles of the options.
fn powers(arguments: &Arguments) -> Result<Vec<Profile>, Failure> {
    profiles(arguments.sigma_rels.as_slice(), Profile::sigma_rel)
        .chain(profiles(arguments.gammas.as_slice(), Profile::gamma))
        .collect()
}

fn options(arguments: &Arguments, from: Tool) -> Result<Import, Failure> {
    arguments.averages.check_unused()?;
    if arguments.sigma_rels.is_none() && arguments.gammas.is_none() {
        let why = format!("the profiles that {from} tracked are missing: give --sigma-rels LIST or --gammas LIST");
        return Err(Failure::Usage(why));
    }
    let Some(update_every) = arguments.update_every else {
        let why = format!("the steps between the updates of {from} are missing: give --update-every N");
        return Err(Failure::Usage(why));
    };
    Ok(Import {
        from,
        profiles: powers(arguments)?,
        update_every,
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
