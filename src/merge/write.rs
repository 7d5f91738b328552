//! Averages, written to files, or to folders like those of the checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::Checkpoints;
use super::mapped::MappedModels;
use super::plan::{Merge, MergeRow};
use super::products::Products;
use crate::checkpoint::{CheckpointModel, file_name};
use crate::device::Device;
use crate::error::{Error, Result, listed};
use crate::math::instruction_set;
use crate::output::{
    Averaged, FilePlan, OutputForm, OutputTarget, PartOutcome, PartSource, PartTarget, PendingPart, check_inputs,
    check_path, is_named_as_file, resolve,
};
use crate::planning::profile_json;
use crate::snapshot::{PROFILE, STEP};
use crate::synthesis::{OutputFile, OutputPart, SourceSet, WriteOptions, check_device, check_distinct};

/// Average to be written.
struct MergeOutput<'a> {
    merge: &'a Merge,
    path: &'a Path,
    row: MergeRow,
    /// True if the average is a folder, false for a file.
    is_folder: bool,
}

/// Writes averages in one pass for all that have the same newest checkpoint.
///
/// # Errors
/// As [`Checkpoints::write_as`].
pub(super) fn write(
    checkpoints: &Checkpoints,
    outputs: &[(&Merge, &Path)],
    form: &OutputForm,
    options: &WriteOptions<'_>,
) -> Result<Device> {
    let planned = plan_outputs(checkpoints, outputs, form, options)?;
    planned.iter().try_for_each(|output| check_path(output.path, output.is_folder))?;
    let mut device = check_device(options.device)?;
    let sources = checkpoints.source_set();
    for alike in planned.chunk_by(|a, b| (a.row.newest, a.is_folder) == (b.row.newest, b.is_folder)) {
        let files = file_plan(checkpoints, &sources, &alike[0], form, options)?;
        let most = checkpoints.products.as_ref().map_or(usize::MAX, Products::targets_in_one_pass);
        for outputs in alike.chunks(files.targets_in_one_pass().min(most)) {
            device = write_in_one_pass(checkpoints, &sources, &files, outputs, options)?;
        }
    }
    Ok(device)
}

/// Writes one part of averages, in one pass for all that have the same newest checkpoint.
///
/// # Errors
/// As [`Checkpoints::write_part`].
pub(super) fn write_part(
    checkpoints: &Checkpoints,
    outputs: &[(&Merge, &Path)],
    form: &OutputForm,
    options: &WriteOptions<'_>,
    part: OutputPart,
) -> Result<PartOutcome> {
    let planned = plan_outputs(checkpoints, outputs, form, options)?;
    check_device(options.device)?;
    let sources = checkpoints.source_set();
    let part_source = |(i, model): (usize, &CheckpointModel)| {
        let name = format!("{} (step {})", file_name(&model.found.path), checkpoints.steps[i]);
        Rc::new(PartSource::new(name, model.found.files.clone()))
    };
    let part_sources: Vec<Rc<PartSource>> = checkpoints.models.iter().enumerate().map(part_source).collect();
    let most = checkpoints.products.as_ref().map_or(usize::MAX, Products::targets_in_one_pass);
    let mut outcome = PartOutcome::default();
    for alike in planned.chunk_by(|a, b| (a.row.newest, a.is_folder) == (b.row.newest, b.is_folder)) {
        let files = file_plan(checkpoints, &sources, &alike[0], form, options)?;
        for outputs in alike.chunks(files.targets_in_one_pass().min(most)) {
            let targets: Vec<PartTarget<'_>> =
                outputs.iter().map(|output| part_target(checkpoints, output, &part_sources)).collect();
            let blend = |pending: Vec<PendingPart>| {
                let row = |part: &PendingPart| outputs[part.target].row.with_weights(&part.weights);
                let rows: Vec<MergeRow> = pending.iter().map(row).collect();
                let rows: Vec<&MergeRow> = rows.iter().collect();
                let mapped = MappedModels::new(checkpoints, &rows, options.progress.unwrap_or(&|_| ()));
                let parts: Vec<Vec<OutputFile>> = pending.into_iter().map(|part| part.files).collect();
                let written = sources.write_part(&mapped.selection(&rows), &files.shards, &parts, part, options);
                written.map_err(|error| mapped.blame(error))
            };
            outcome.join(files.write_part(&targets, part, options.dtype, &blend)?);
        }
    }
    Ok(outcome)
}

/// Describes an average that is written in parts. `sources` has an entry for each checkpoint.
fn part_target<'a>(checkpoints: &Checkpoints, output: &MergeOutput<'a>, sources: &[Rc<PartSource>]) -> PartTarget<'a> {
    let MergeOutput { merge, path, ref row, .. } = *output;
    let used = sources.iter().enumerate().filter(|(i, _)| *i == row.newest || row.weights[*i] != 0.0);
    // Each part computes the products. Factors of different decompositions do not fit together.
    let products = checkpoints
        .products
        .as_ref()
        .map_or(String::new(), |_| format!(", of products of adapters, computed with {}", instruction_set()));
    PartTarget {
        path,
        metadata: metadata(merge),
        label: format!("{} at step {}{products}", merge.profile, merge.at),
        sources: used.map(|(_, source)| Rc::clone(source)).collect(),
        weights: merge.weights.iter().map(|weight| weight.weight).collect(),
    }
}

/// Checks outputs, and matches their averages to the open checkpoints.
fn plan_outputs<'a>(
    checkpoints: &Checkpoints,
    outputs: &[(&'a Merge, &'a Path)],
    form: &OutputForm,
    options: &WriteOptions<'_>,
) -> Result<Vec<MergeOutput<'a>>> {
    let places: Vec<PathBuf> = outputs.iter().map(|(_, path)| resolve(path)).collect::<Result<_>>()?;
    check_distinct(places.iter().map(PathBuf::as_path))?;
    options.check()?;
    if outputs.is_empty() {
        return Err(Error::NoTarget);
    }
    outputs.iter().map(|&(merge, path)| MergeOutput::new(checkpoints, merge, path, form)).collect()
}

/// Returns notes on how the tensors of averages are written in a form.
///
/// # Errors
/// As [`Checkpoints::check_form`].
pub(super) fn notes(checkpoints: &Checkpoints, merges: &[Merge], form: &OutputForm) -> Result<Vec<String>> {
    let Some(merge) = merges.first().filter(|_| !form.is_plain()) else { return Ok(Vec::new()) };
    let row = MergeRow::new(checkpoints, merge)?;
    let is_folder = form.is_folder() || checkpoints.models[row.newest].found.folder.is_some();
    let output = MergeOutput { merge, path: Path::new(""), row, is_folder };
    let mut notes = file_plan(checkpoints, &checkpoints.source_set(), &output, form, &WriteOptions::default())?.notes;
    let read = &checkpoints.models[output.row.newest].left_out;
    let only_there: Vec<&str> =
        form.left_out().iter().filter(|name| !read.contains(name)).map(String::as_str).collect();
    if !only_there.is_empty() {
        notes.push(format!("left out, though the folder that averages are like has it: {}", listed(&only_there)));
    }
    Ok(notes)
}

/// Plans the files of averages that have one newest checkpoint.
fn file_plan(
    checkpoints: &Checkpoints,
    sources: &SourceSet<'_>,
    output: &MergeOutput<'_>,
    form: &OutputForm,
    options: &WriteOptions<'_>,
) -> Result<FilePlan> {
    let models = &checkpoints.models;
    let is_one = |model: &CheckpointModel, a: &str, b: &str| model.share_elements(a, b) || model.equal_matrices(a, b);
    let newest = &models[output.row.newest];
    let averaged = Averaged {
        set: sources,
        example: Some(newest),
        is_folder: output.is_folder && newest.found.folder.is_some(),
        follow_links: checkpoints.follow_links,
        is_tied: &|a, b| models.iter().all(|model| is_one(model, a, b)),
        left_out: &newest.left_out,
    };
    FilePlan::new(&averaged, form, options.dtype)
}

impl<'a> MergeOutput<'a> {
    /// Decides on file or folder, and checks that its place is outside of all inputs.
    fn new(checkpoints: &Checkpoints, merge: &'a Merge, path: &'a Path, form: &OutputForm) -> Result<MergeOutput<'a>> {
        let row = MergeRow::new(checkpoints, merge)?;
        let newest = &checkpoints.models[row.newest];
        let is_folder = form.is_folder() || newest.found.folder.is_some() && !is_named_as_file(path);
        check_place(checkpoints, path)?;
        check_inputs(path, form.folder())?;
        if !is_folder {
            check_single_model(newest)?;
        }
        Ok(MergeOutput { merge, path, row, is_folder })
    }
}

/// Checks that nothing is written into an input or over it.
fn check_place(checkpoints: &Checkpoints, path: &Path) -> Result<()> {
    let place = resolve(path)?;
    let mut files = checkpoints.models.iter().flat_map(|model| &model.found.files);
    if files.any(|file| resolve(file).is_ok_and(|file| file == place)) {
        let why = "this is one of the checkpoints, which are left untouched: write elsewhere";
        return Err(Error::unexpected(path, why));
    }
    // The folder of an index that was named may hold anything else, too.
    let is_folder = |model: &&CheckpointModel| model.found.folder.as_ref() == Some(&model.found.path);
    let inputs = checkpoints.models.iter().filter(is_folder).map(|model| &model.found.path);
    check_inputs(path, inputs.chain(&checkpoints.named))
}

/// Checks that a checkpoint has no weights beside those of its model, which one file could not hold apart.
fn check_single_model(newest: &CheckpointModel) -> Result<()> {
    let Some(other) = newest.found.files.get(newest.found.own_files) else { return Ok(()) };
    let why = format!(
        "`{}` holds other weights beside the model's, and one file cannot hold both: name a folder to write to, or \
         leave them out with --leave-out '{}/*' (`leave_out`)",
        file_name(other),
        file_name(other)
    );
    Err(Error::unexpected(&newest.found.path, why))
}

/// Writes averages that have the same newest checkpoint and are all files or all folders.
fn write_in_one_pass(
    checkpoints: &Checkpoints,
    sources: &SourceSet<'_>,
    files: &FilePlan,
    outputs: &[MergeOutput<'_>],
    options: &WriteOptions<'_>,
) -> Result<Device> {
    let targets: Vec<OutputTarget<'_>> =
        outputs.iter().map(|output| OutputTarget { path: output.path, metadata: metadata(output.merge) }).collect();
    let open = files.create(&targets)?;
    let rows: Vec<&MergeRow> = outputs.iter().map(|output| &output.row).collect();
    let mapped = MappedModels::new(checkpoints, &rows, options.progress.unwrap_or(&|_| ()));
    let written = sources.write_files(&mapped.selection(&rows), &files.shards, &open.files, options);
    let device = written.map_err(|error| mapped.blame(error))?;
    drop(mapped);
    files.finish(open)?;
    Ok(device)
}

/// Returns the metadata of an average: its profile and its step.
fn metadata(merge: &Merge) -> BTreeMap<String, String> {
    BTreeMap::from([(PROFILE.into(), profile_json(&merge.profile)), (STEP.into(), merge.at.to_string())])
}
