//! The run, written checkpoint by checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::ImportReport;
use super::counters::Count;
use super::messages::join_names;
use super::plan::ImportPlan;
use super::planned::PlannedSnapshot;
use super::snapshots::NewRun;
use super::tensors::ImportTensors;
use crate::error::{Error, Result};
use crate::planning::{history_json, profile_json};
use crate::pytorch::Checkpoint;
use crate::snapshot::Meta;
use crate::tensor::{TensorSpec, first_non_finite_in};

/// Writes a run whole, or nothing.
pub(super) fn write(plan: &ImportPlan, dir: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<ImportReport> {
    let mut run = NewRun::create(dir)?;
    let mut statistics = NormStatistics::default();
    for snapshot in &plan.snapshots {
        let checkpoint = open(plan, snapshot)?;
        statistics.add(&plan.tensors, snapshot.id.step, &checkpoint)?;
        write_one(plan, snapshot, &checkpoint, &mut run, progress)?;
    }
    run.finish(&plan.profiles, plan.warnings.iter().cloned().chain(statistics.warning()).collect())
}

/// Opens the file of a snapshot and checks its averages.
fn open(plan: &ImportPlan, snapshot: &PlannedSnapshot) -> Result<Checkpoint> {
    let path = &snapshot.file.path;
    let checkpoint = Checkpoint::open(path)?;
    let tensors = &plan.tensors;
    if !tensors.iter().all(|(spec, key)| is_unchanged(&checkpoint, spec, key)) {
        let why = "the file was changed while it was imported: import again when it is whole";
        return Err(Error::unexpected(path, why));
    }
    let each: Vec<(&TensorSpec, &str)> = tensors.iter().collect();
    let found = each.into_par_iter().find_map_first(|(spec, key)| {
        let is_average = !tensors.copied.contains(&spec.name) && !tensors.counters.contains(&spec.name);
        let elements = checkpoint.scattered(key).filter(|_| is_average)?;
        first_non_finite_in(spec.dtype, elements).map(|(element, value)| (&spec.name, element, value))
    });
    let Some((name, element, value)) = found else { return Ok(checkpoint) };
    let why = format!(
        "tensor `{name}` holds {value} at element {element}, and every average that it is blended into would: move the \
         checkpoints of this step out of the directory"
    );
    Err(Error::unexpected(path, why))
}

/// Returns true if a file still holds a tensor as it was when the import was planned.
fn is_unchanged(checkpoint: &Checkpoint, spec: &TensorSpec, key: &str) -> bool {
    let same = |now: TensorSpec| now.dtype == spec.dtype && now.shape == spec.shape;
    checkpoint.has(key) && checkpoint.spec(key).is_ok_and(same)
}

/// Writes one snapshot. The elements are read as they are written.
fn write_one(
    plan: &ImportPlan,
    snapshot: &PlannedSnapshot,
    checkpoint: &Checkpoint,
    run: &mut NewRun,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let tensors = &plan.tensors;
    let mut counts: BTreeMap<usize, [u8; 8]> = BTreeMap::new();
    for (i, (spec, key)) in tensors.iter().enumerate() {
        if tensors.counters.contains(&spec.name) {
            let bytes = checkpoint.read(key)?;
            progress(bytes.len() as u64);
            let count = match Count::parse(&bytes, spec.dtype) {
                Some(Count::Known(count)) => count,
                Some(Count::Overflown) | None => snapshot.id.step as i64,
            };
            counts.insert(i, count.to_le_bytes());
        }
    }
    let id = snapshot.id;
    let meta = Meta {
        profile: profile_json(&plan.profiles[id.index]),
        step: id.step,
        history: Some(history_json(&plan.chains[id.index], snapshot.updates.clone())),
        copied: tensors.copied.clone(),
        ..Meta::default()
    };
    let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| {
        if let Some(count) = counts.get(&i) {
            return dst.copy_from_slice(&count[range]);
        }
        progress(range.len() as u64);
        checkpoint.scattered(&tensors.keys[i]).into_iter().for_each(|elements| elements.copy(dst, range.start));
    };
    run.add(id, tensors.stored_specs(), meta, &fill)
}

/// Running means of norms, which pytorch-posthoc-ema stores but does not always update.
#[derive(Default)]
struct NormStatistics {
    steps: BTreeSet<u64>,
    /// Values of each, until they change.
    constant: BTreeMap<String, Option<Vec<u8>>>,
}

impl NormStatistics {
    fn add(&mut self, tensors: &ImportTensors, step: u64, checkpoint: &Checkpoint) -> Result<()> {
        self.steps.insert(step);
        for (spec, key) in tensors.iter() {
            if spec.name.rsplit('.').next() != Some("running_mean") {
                continue;
            }
            let bytes = checkpoint.read(key)?;
            let constant = self.constant.entry(spec.name.clone()).or_insert_with(|| Some(bytes.clone()));
            if constant.as_ref().is_some_and(|first| *first != bytes) {
                *constant = None;
            }
        }
        Ok(())
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
