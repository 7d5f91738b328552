//! The run, written checkpoint by checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::ImportReport;
use super::counters::Count;
use super::messages::join_names;
use super::plan::ImportPlan;
use super::planned::PlannedSnapshot;
use super::tensors::ImportTensors;
use crate::error::{Error, Result};
use crate::fs::AtomicFolder;
use crate::planning::{history_json, profile_json};
use crate::pytorch::Checkpoint;
use crate::run::Run;
use crate::snapshot::{Meta, SHARD_SIZE, new_run_id, write_snapshot};
use crate::tensor::{TensorSpec, first_non_finite};

/// Writes a run whole, or nothing.
pub(super) fn write(plan: &ImportPlan, dir: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<ImportReport> {
    let target = AtomicFolder::create(dir, "import")?;
    let run = new_run_id();
    let mut bytes = 0;
    let mut statistics = NormStatistics::default();
    for snapshot in &plan.snapshots {
        let values = read(plan, snapshot, progress)?;
        statistics.add(&plan.tensors, snapshot.id.step, &values);
        bytes += write_one(plan, snapshot, target.path(), &run, &values)?;
    }
    // Makes a reader's checks across the files before anyone can see the run.
    Run::open(target.path())?;
    target.commit()?;
    let steps: BTreeSet<u64> = plan.snapshots.iter().map(|snapshot| snapshot.id.step).collect();
    Ok(ImportReport {
        snapshots: plan.snapshots.len(),
        steps: steps.into_iter().collect(),
        profiles: plan.profiles.clone(),
        bytes,
        warnings: plan.warnings.iter().cloned().chain(statistics.warning()).collect(),
    })
}

/// Reads the elements of all tensors, as the snapshot stores them.
fn read(plan: &ImportPlan, snapshot: &PlannedSnapshot, progress: &(dyn Fn(u64) + Sync)) -> Result<Vec<Vec<u8>>> {
    let path = &snapshot.file.path;
    let checkpoint = Checkpoint::open(path)?;
    let tensors = &plan.tensors;
    if !tensors.iter().all(|(spec, key)| is_unchanged(&checkpoint, spec, key)) {
        let why = "the file was changed while it was imported: import again when it is whole";
        return Err(Error::unexpected(path, why));
    }
    let each = tensors.specs.par_iter().zip(&tensors.keys);
    // Collected before errors are looked for, so that the first one does not depend on the threads.
    let read: Vec<Result<Vec<u8>>> = each
        .map(|(spec, key)| {
            let bytes = checkpoint.read(key)?;
            progress(bytes.len() as u64);
            stored_bytes(tensors, snapshot, spec, bytes)
        })
        .collect();
    read.into_iter().collect()
}

/// Converts the elements of a tensor as read to those that the snapshot stores, and checks that averages are finite.
fn stored_bytes(
    tensors: &ImportTensors,
    snapshot: &PlannedSnapshot,
    spec: &TensorSpec,
    bytes: Vec<u8>,
) -> Result<Vec<u8>> {
    if tensors.counters.contains(&spec.name) {
        let count = match Count::parse(&bytes, spec.dtype) {
            Some(Count::Known(count)) => count,
            Some(Count::Overflown) | None => snapshot.id.step as i64,
        };
        return Ok(count.to_le_bytes().to_vec());
    }
    if !tensors.copied.contains(&spec.name) {
        check_finite(&snapshot.file.path, spec, &bytes)?;
    }
    Ok(bytes)
}

/// Returns true if a file still holds a tensor as it was when the import was planned.
fn is_unchanged(checkpoint: &Checkpoint, spec: &TensorSpec, key: &str) -> bool {
    let same = |now: TensorSpec| now.dtype == spec.dtype && now.shape == spec.shape;
    checkpoint.has(key) && checkpoint.spec(key).is_ok_and(same)
}

fn check_finite(path: &Path, spec: &TensorSpec, bytes: &[u8]) -> Result<()> {
    let Some((element, value)) = first_non_finite(spec.dtype, bytes) else { return Ok(()) };
    let why = format!(
        "tensor `{}` holds {value} at element {element}, and every average that it is blended into would: move the \
         checkpoints of this step out of the directory",
        spec.name
    );
    Err(Error::unexpected(path, why))
}

/// Writes one snapshot and returns the size of its files in bytes.
fn write_one(plan: &ImportPlan, snapshot: &PlannedSnapshot, dir: &Path, run: &str, values: &[Vec<u8>]) -> Result<u64> {
    let id = snapshot.id;
    let meta = Meta {
        profile: profile_json(&plan.profiles[id.index]),
        step: id.step,
        history: Some(history_json(&plan.chains[id.index], snapshot.updates.clone())),
        run: Some(run.to_owned()),
        copied: plan.tensors.copied.clone(),
        ..Meta::default()
    };
    let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| dst.copy_from_slice(&values[i][range]);
    let paths = write_snapshot(dir, id, plan.tensors.stored_specs(), &meta, SHARD_SIZE, &fill)?;
    let mut bytes = 0;
    for path in &paths {
        bytes += fs::metadata(path).map_err(Error::io("read", path))?.len();
    }
    Ok(bytes)
}

/// Running means of norms, which pytorch-posthoc-ema stores but does not always update.
#[derive(Default)]
struct NormStatistics {
    steps: BTreeSet<u64>,
    /// Values of each, until they change.
    constant: BTreeMap<String, Option<Vec<u8>>>,
}

impl NormStatistics {
    fn add(&mut self, tensors: &ImportTensors, step: u64, values: &[Vec<u8>]) {
        self.steps.insert(step);
        for (spec, bytes) in tensors.specs.iter().zip(values) {
            if spec.name.rsplit('.').next() != Some("running_mean") {
                continue;
            }
            let constant = self.constant.entry(spec.name.clone()).or_insert_with(|| Some(bytes.clone()));
            if constant.as_ref().is_some_and(|first| first != bytes) {
                *constant = None;
            }
        }
    }

    fn warning(&self) -> Option<String> {
        let constant: Vec<&str> =
            self.constant.iter().filter(|(_, first)| first.is_some()).map(|(name, _)| name.as_str()).collect();
        if constant.is_empty() || self.steps.len() < 2 {
            return None;
        }
        Some(format!(
            "{} the same in all checkpoints (pytorch-posthoc-ema up to 1.0.5, and with `only_save_diff` later versions \
             too, never updates the statistics of norms): unless the model kept them so, estimate them again before an \
             evaluation",
            join_names(&constant)
        ))
    }
}
