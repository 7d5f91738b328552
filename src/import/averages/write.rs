//! The run of some averages, written snapshot by snapshot.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::plan::{AveragesPlan, PlannedAverage};
use crate::checkpoint::{CheckpointModel, SeriesTensor, first_odd};
use crate::error::{Error, Result};
use crate::import::ImportReport;
use crate::import::snapshots::NewRun;
use crate::planning::{history_json, profile_json};
use crate::snapshot::Meta;
use crate::tensor::TensorSpec;

/// Writes a run whole, or nothing.
pub(super) fn write(plan: &AveragesPlan, dir: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<ImportReport> {
    let mut run = NewRun::create(dir)?;
    for snapshot in &plan.snapshots {
        write_one(plan, snapshot, &mut run, progress)?;
    }
    run.finish(&plan.profiles, plan.warnings.clone())
}

/// Writes one snapshot. The elements are read as they are written.
fn write_one(
    plan: &AveragesPlan,
    snapshot: &PlannedAverage,
    run: &mut NewRun,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let checkpoints = &plan.opened[snapshot.id.index];
    let tensors = checkpoints.series_tensors();
    let mut elements = Vec::with_capacity(tensors.len());
    for tensor in &tensors {
        elements.push(checkpoints.elements(snapshot.checkpoint, tensor.name)?);
    }
    check_finite(plan, &checkpoints.models[snapshot.checkpoint], &tensors)?;
    let specs = tensors.iter().map(spec).collect();
    let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| {
        progress(range.len() as u64);
        if let Some(elements) = elements[i].on_host() {
            elements.copy(dst, range.start);
        }
    };
    run.add(snapshot.id, specs, meta(plan, snapshot, &tensors), &fill)
}

fn spec(tensor: &SeriesTensor<'_>) -> TensorSpec {
    TensorSpec { name: tensor.name.to_owned(), dtype: tensor.dtype, shape: tensor.shape.to_vec() }
}

/// Returns the metadata of a snapshot. The dtypes of the model are those of the first average.
fn meta(plan: &AveragesPlan, snapshot: &PlannedAverage, tensors: &[SeriesTensor<'_>]) -> Meta {
    let index = snapshot.id.index;
    let step = snapshot.id.step;
    let model = plan.opened[0].series_tensors();
    let dtypes = tensors.iter().zip(&model).filter(|(own, model)| own.dtype != model.dtype);
    Meta {
        profile: profile_json(&plan.profiles[index]),
        step,
        history: plan.history.as_ref().map(|history| history_json(&plan.chains[index], history.until(step))),
        dtypes: dtypes.map(|(own, model)| (own.name.to_owned(), model.dtype)).collect(),
        copied: plan.copied.clone(),
        ..Meta::default()
    }
}

/// Checks that averaged tensors hold neither NaN nor infinities, except for those that all averages share.
fn check_finite(plan: &AveragesPlan, model: &CheckpointModel, tensors: &[SeriesTensor<'_>]) -> Result<()> {
    let averaged = tensors.par_iter().filter(|tensor| tensor.averaged && !plan.copied.contains(tensor.name));
    let others = plan.opened.iter().flat_map(|opened| &opened.models);
    let found = averaged.find_map_first(|tensor| {
        first_odd(model, tensor.name, others.clone()).map(|(element, value)| (tensor.name, element, value))
    });
    let Some((name, element, value)) = found else { return Ok(()) };
    let why = format!(
        "tensor `{name}` holds {value} at element {element}, which not all averages do, and every average that it is \
         blended into would: copy the tensor with --copy (`copy`), leave it out with --leave-out (`leave_out`), or \
         move this checkpoint out of the folder"
    );
    Err(Error::unexpected(&model.found.path, why))
}
