//! `posthoc-ema import`.

use std::path::Path;
use std::time::Instant;

use posthoc_ema::{Import, Imported, Profile};
use serde_json::json;

use super::args::Import as Arguments;
use super::output::{byte_bar, bytes, print, print_json};
use super::{Failure, Outcome, targets};

/// Writes another tool's checkpoints as a run.
pub fn run(arguments: &Arguments) -> Outcome {
    let import = options(arguments)?;
    import.check().map_err(targets::usage)?;
    let bar = byte_bar(size(&arguments.dir), "importing");
    let start = Instant::now();
    let imported = import.write(&arguments.dir, &arguments.run, Some(&|bytes| bar.inc(bytes)));
    bar.finish_and_clear();
    let (imported, seconds) = (imported?, start.elapsed().as_secs_f64());
    if arguments.json {
        print_json(&document(arguments, &imported, seconds));
        return Ok(());
    }
    imported.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    print(&summary(arguments, &imported, seconds));
    Ok(())
}

fn options(arguments: &Arguments) -> Result<Import, Failure> {
    let profiles = targets::profiles(arguments.sigma_rels.as_slice(), Profile::sigma_rel)
        .chain(targets::profiles(arguments.gammas.as_slice(), Profile::gamma));
    Ok(Import {
        from: arguments.from.into(),
        profiles: profiles.collect::<Result<_, _>>()?,
        update_every: arguments.update_every,
        update_after_step: arguments.update_after_step,
        step_size_correction: arguments.step_size_correction,
    })
}

/// The bytes of all checkpoints, for the bar; what cannot be read is reported by the import.
fn size(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let checkpoints = entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "pt"));
    checkpoints.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

fn summary(arguments: &Arguments, imported: &Imported, seconds: f64) -> String {
    let names: Vec<String> = imported.profiles.iter().map(ToString::to_string).collect();
    let steps = match imported.steps.as_slice() {
        [first, .., last] => format!("{} steps ({first} to {last})", imported.steps.len()),
        steps => format!("{} step ({})", steps.len(), steps.first().unwrap_or(&0)),
    };
    format!(
        "{} snapshots of {} at {steps} written to {}: {} in {seconds:.2} s",
        imported.snapshots,
        names.join(", "),
        arguments.run.display(),
        bytes(imported.bytes)
    )
}

fn document(arguments: &Arguments, imported: &Imported, seconds: f64) -> serde_json::Value {
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
