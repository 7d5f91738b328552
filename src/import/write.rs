//! Checkpoint by checkpoint into the run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;

use super::ImportReport;
use super::plan::{Plan, Source, Tensors, counted};
use crate::error::{Error, Result};
use crate::fs::AtomicFolder;
use crate::pytorch::{self, Checkpoint, Number};

use crate::snapshot::{Meta, SHARD_SIZE, new_run_id, write_snapshot};

use crate::planning::{history_json, profile_json};
use crate::run::Run;
use crate::tensor::{TensorSpec, first_non_finite};

/// Writes a run, or nothing.
pub(super) fn write(plan: &Plan, dir: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<ImportReport> {
    let target = AtomicFolder::create(dir, "import")?;
    let dir = target.path();
    let (run, mut bytes) = (new_run_id(), 0);
    let mut statistics = Statistics::default();
    for source in &plan.sources {
        let values = read(plan, source, progress)?;
        statistics.look(&plan.tensors, source.stem.step, &values);
        bytes += write_one(plan, source, dir, &run, &values)?;
    }
    // What a reader checks across the files is checked before anybody can take them for a run.
    Run::open(dir)?;
    target.commit()?;
    let steps: BTreeSet<u64> = plan.sources.iter().map(|source| source.stem.step).collect();
    Ok(ImportReport {
        snapshots: plan.sources.len(),
        steps: steps.into_iter().collect(),
        profiles: plan.profiles.clone(),
        bytes,
        warnings: plan.warnings.iter().cloned().chain(statistics.warning()).collect(),
    })
}

/// The elements of all tensors, as the snapshot stores them.
fn read(plan: &Plan, source: &Source, progress: &(dyn Fn(u64) + Sync)) -> Result<Vec<Vec<u8>>> {
    let checkpoint = Checkpoint::open(&source.file.path)?;
    check_unchanged(plan, source, &checkpoint)?;
    let tensors = &plan.tensors;
    let one = |(spec, key): (&TensorSpec, &String)| {
        let mut bytes = checkpoint.read(key)?;
        progress(bytes.len() as u64);
        if tensors.counters.contains(&spec.name) {
            let count = counted(&bytes, spec.dtype).flatten();
            bytes = count.unwrap_or(source.stem.step as i64).to_le_bytes().to_vec();
        } else if !tensors.copied.contains(&spec.name) {
            check_finite(&source.file.path, spec, &bytes)?;
        }
        Ok(bytes)
    };
    // Collected before the first error is looked for, so that it is the same one whatever the threads do.
    let read: Vec<Result<Vec<u8>>> = tensors.specs.par_iter().zip(&tensors.keys).map(one).collect();
    read.into_iter().collect()
}

fn check_unchanged(plan: &Plan, source: &Source, checkpoint: &Checkpoint) -> Result<()> {
    let path = &source.file.path;
    let changed =
        || Error::unexpected(path, "the file was changed while it was imported: import again when it is whole");
    let same = |(spec, key): (&TensorSpec, &String)| {
        checkpoint.has(key) && checkpoint.spec(key).is_ok_and(|its| its.dtype == spec.dtype && its.shape == spec.shape)
    };
    if plan.tensors.specs.iter().zip(&plan.tensors.keys).all(same) { Ok(()) } else { Err(changed()) }
}

fn check_finite(path: &Path, spec: &TensorSpec, bytes: &[u8]) -> Result<()> {
    let Some((element, value)) = first_non_finite(spec.dtype, bytes) else { return Ok(()) };
    let why = format!(
        "tensor `{}` holds {value} at element {element}, and every average that it is blended into would: move the checkpoints \
         of this step out of the directory",
        spec.name
    );
    Err(Error::unexpected(path, why))
}

/// One element of a floating-point tensor.
pub(super) fn number_at(dtype: Dtype, bytes: &[u8], element: usize) -> f64 {
    let size = dtype.bitsize() / 8;
    match pytorch::number(dtype, &bytes[element * size..(element + 1) * size]) {
        Some(Number::Rounded(value, _)) => value,
        _ => f64::NAN,
    }
}

/// Writes one snapshot and returns the size of its files.
fn write_one(plan: &Plan, source: &Source, dir: &Path, run: &str, values: &[Vec<u8>]) -> Result<u64> {
    let Source { stem, updates, .. } = source;
    let meta = Meta {
        profile: profile_json(&plan.profiles[stem.index]),
        step: stem.step,
        history: Some(history_json(&plan.chains[stem.index], updates.clone())),
        run: Some(run.to_owned()),
        copied: plan.tensors.copied.clone(),
        ..Meta::default()
    };
    let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| dst.copy_from_slice(&values[i][range]);
    let paths = write_snapshot(dir, *stem, plan.tensors.stored_specs(), &meta, SHARD_SIZE, &fill)?;
    let size = |path: &PathBuf| fs::metadata(path).map(|file| file.len()).map_err(Error::io("read", path));
    paths.iter().map(size).sum()
}

/// Running means of norms, which pytorch-posthoc-ema stores but does not always update.
#[derive(Default)]
struct Statistics {
    steps: BTreeSet<u64>,
    /// The values of each, as long as they have not changed.
    same: BTreeMap<String, Option<Vec<u8>>>,
}

impl Statistics {
    fn look(&mut self, tensors: &Tensors, step: u64, values: &[Vec<u8>]) {
        self.steps.insert(step);
        let running = |name: &str| name.rsplit('.').next() == Some("running_mean");
        for (spec, bytes) in tensors.specs.iter().zip(values).filter(|(spec, _)| running(&spec.name)) {
            let same = self.same.entry(spec.name.clone()).or_insert_with(|| Some(bytes.clone()));
            if same.as_ref().is_some_and(|same| same != bytes) {
                *same = None;
            }
        }
    }

    fn warning(&self) -> Option<String> {
        let same: Vec<&str> =
            self.same.iter().filter(|(_, same)| same.is_some()).map(|(name, _)| name.as_str()).collect();
        (!same.is_empty() && self.steps.len() > 1).then(|| {
            format!(
                "{} the same in all checkpoints (pytorch-posthoc-ema up to 1.0.5, and with `only_save_diff` later \
                 versions too, never updates the statistics of norms): unless the model kept them so, estimate them anew before an evaluation",
                are(&same)
            )
        })
    }
}

/// "`a` is" or "`a` and 2 more are".
pub(super) fn are(names: &[&str]) -> String {
    match names {
        [] => "nothing is".into(),
        [name] => format!("`{name}` is"),
        [name, more @ ..] => format!("`{name}` and {} more are", more.len()),
    }
}
