//! The run of some averages, written snapshot by snapshot.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::plan::{AveragesPlan, PlannedAverage};
use crate::checkpoint::SeriesTensor;
use crate::error::{Error, Result};
use crate::fs::AtomicFolder;
use crate::import::ImportReport;
use crate::planning::{history_json, profile_json};
use crate::run::Run;
use crate::snapshot::{Meta, SHARD_SIZE, new_run_id, write_snapshot};
use crate::tensor::{TensorSpec, first_non_finite};

/// Writes a run whole, or nothing.
pub(super) fn write(plan: &AveragesPlan, dir: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<ImportReport> {
    let target = AtomicFolder::create(dir, "import")?;
    let run = new_run_id();
    let mut bytes = 0;
    for snapshot in &plan.snapshots {
        bytes += write_one(plan, snapshot, target.path(), &run, progress)?;
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
        warnings: plan.warnings.clone(),
    })
}

/// Writes one snapshot and returns the size of its files in bytes.
fn write_one(
    plan: &AveragesPlan,
    snapshot: &PlannedAverage,
    dir: &Path,
    run: &str,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<u64> {
    let checkpoints = &plan.opened[snapshot.id.index];
    let tensors = checkpoints.series_tensors();
    let elements: Vec<Cow<'_, [u8]>> =
        tensors.iter().map(|tensor| checkpoints.elements(snapshot.checkpoint, tensor.name)).collect::<Result<_>>()?;
    check_finite(plan, checkpoints.path(snapshot.checkpoint), &tensors, &elements)?;
    let specs = tensors.iter().map(spec).collect();
    let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| {
        progress(range.len() as u64);
        dst.copy_from_slice(&elements[i][range]);
    };
    let paths = write_snapshot(dir, snapshot.id, specs, &meta(plan, snapshot, &tensors, run), SHARD_SIZE, &fill)?;
    let mut bytes = 0;
    for path in &paths {
        bytes += fs::metadata(path).map_err(Error::io("read", path))?.len();
    }
    Ok(bytes)
}

fn spec(tensor: &SeriesTensor<'_>) -> TensorSpec {
    TensorSpec { name: tensor.name.to_owned(), dtype: tensor.dtype, shape: tensor.shape.to_vec() }
}

/// Returns the metadata of a snapshot. The dtypes of the model are those of the first average.
fn meta(plan: &AveragesPlan, snapshot: &PlannedAverage, tensors: &[SeriesTensor<'_>], run: &str) -> Meta {
    let index = snapshot.id.index;
    let step = snapshot.id.step;
    let model = plan.opened[0].series_tensors();
    let dtypes = tensors.iter().zip(&model).filter(|(own, model)| own.dtype != model.dtype);
    Meta {
        profile: profile_json(&plan.profiles[index]),
        step,
        history: plan.history.as_ref().map(|history| history_json(&plan.chains[index], history.until(step))),
        dtypes: dtypes.map(|(own, model)| (own.name.to_owned(), model.dtype)).collect(),
        run: Some(run.to_owned()),
        copied: plan.copied.clone(),
        ..Meta::default()
    }
}

/// Checks that averaged tensors hold neither NaN nor infinities.
fn check_finite(
    plan: &AveragesPlan,
    path: &Path,
    tensors: &[SeriesTensor<'_>],
    elements: &[Cow<'_, [u8]>],
) -> Result<()> {
    let averaged = tensors.par_iter().zip(elements);
    let averaged = averaged.filter(|(tensor, _)| tensor.averaged && !plan.copied.contains(tensor.name));
    let found = averaged.find_map_first(|(tensor, elements)| {
        first_non_finite(tensor.dtype, elements).map(|(element, value)| (tensor.name, element, value))
    });
    let Some((name, element, value)) = found else { return Ok(()) };
    let why = format!(
        "tensor `{name}` holds {value} at element {element}, and every average that it is blended into would: copy the \
         tensor with --copy (`copy`), leave it out with --leave-out (`leave_out`), or move this checkpoint out of the \
         folder"
    );
    Err(Error::unexpected(path, why))
}
