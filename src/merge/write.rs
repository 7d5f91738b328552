//! Averages, written to files, or to folders like those of the checkpoints.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::path::{Component, Path, PathBuf};

use super::Checkpoints;
use super::mapped::MappedModels;
use super::plan::{Merge, MergeRow};
use crate::checkpoint::{
    CheckpointModel, CopySource, auxiliary_files, file_name, name_in_file, safetensors_name, split_index,
};
use crate::device::Device;
use crate::error::{Error, Result, shown};
use crate::fs::{AtomicFolder, CreatedDirs, Stream, check_output, check_regular, check_vacant, parent_dir};
use crate::planning::profile_json;
use crate::snapshot::{INDEX_SUFFIX, PROFILE, STEP, base_strings};
use crate::synthesis::{MAX_TARGETS, OutputFile, Shards, SourceSet, WriteOptions, check_device, check_distinct};

/// Keys of metadata that are not carried over: checksums of the data, and entries of a snapshot.
const NOT_CARRIED: [&str; 8] = [
    "checksum",
    "header_checksum",
    "history",
    "run",
    "copied",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
];

/// Average to be written.
struct MergeOutput<'a> {
    merge: &'a Merge,
    path: &'a Path,
    row: MergeRow,
    /// True if the average is a folder, false for a file.
    folder: bool,
}

/// Writes averages in one pass for all that have the same newest checkpoint.
///
/// # Errors
/// As [`Checkpoints::write`].
pub(super) fn write(
    checkpoints: &Checkpoints,
    outputs: &[(&Merge, &Path)],
    options: &WriteOptions<'_>,
) -> Result<Device> {
    let places: Vec<PathBuf> = outputs.iter().map(|(_, path)| resolve(path)).collect::<Result<_>>()?;
    check_distinct(places.iter().map(PathBuf::as_path))?;
    options.check()?;
    let mut planned = Vec::with_capacity(outputs.len());
    for &(merge, path) in outputs {
        planned.push(MergeOutput::new(checkpoints, merge, path)?);
    }
    if planned.is_empty() {
        return Err(Error::NoTarget);
    }
    let mut device = check_device(options.device)?;
    for alike in planned.chunk_by(|a, b| (a.row.newest, a.folder) == (b.row.newest, b.folder)) {
        let newest = &checkpoints.models[alike[0].row.newest];
        for outputs in alike.chunks((MAX_TARGETS / newest.files.len()).max(1)) {
            device = write_in_one_pass(checkpoints, newest, outputs, options)?;
        }
    }
    Ok(device)
}

impl<'a> MergeOutput<'a> {
    /// Decides on file or folder, and checks that it can be written there.
    fn new(checkpoints: &Checkpoints, merge: &'a Merge, path: &'a Path) -> Result<MergeOutput<'a>> {
        let row = MergeRow::new(checkpoints, merge)?;
        let newest = &checkpoints.models[row.newest];
        let named_as_file =
            Stream::is_named(path) || path.extension().is_some_and(|extension| extension == "safetensors");
        let folder = newest.found.folder.is_some() && !named_as_file;
        check_place(checkpoints, path, folder)?;
        if folder {
            check_file_names(newest)?;
        } else {
            check_single_model(newest)?;
        }
        Ok(MergeOutput { merge, path, row, folder })
    }
}

/// Checks that nothing is written into an input or over it, nor a folder over anything, nor a file over a device.
fn check_place(checkpoints: &Checkpoints, path: &Path, folder: bool) -> Result<()> {
    let place = resolve(path)?;
    let mut files = checkpoints.models.iter().flat_map(|model| &model.found.files);
    if files.any(|file| resolve(file).is_ok_and(|file| file == place)) {
        let why = "this is one of the checkpoints, which are left untouched: write elsewhere";
        return Err(Error::unexpected(path, why));
    }
    // The folder of an index that was named may hold anything else, too.
    let is_folder = |model: &&CheckpointModel| model.found.folder.as_ref() == Some(&model.found.path);
    let inputs = checkpoints.models.iter().filter(is_folder).map(|model| &model.found.path);
    for input in inputs.chain(&checkpoints.named) {
        if resolve(input).is_ok_and(|dir| place.starts_with(dir)) {
            let why = format!("this is inside {}, which is left untouched: write elsewhere", shown(input));
            return Err(Error::unexpected(path, why));
        }
    }
    if folder { check_vacant(path) } else { check_output(path) }
}

/// Returns the absolute path, with links and `..` resolved.
///
/// Components that do not exist yet will be plain directories.
fn resolve(path: &Path) -> Result<PathBuf> {
    let mut place = PathBuf::new();
    for component in std::path::absolute(path).map_err(Error::io("find", path))?.components() {
        match component {
            Component::ParentDir => {
                place.pop();
            }
            component => place.push(component),
        }
        place = place.canonicalize().unwrap_or(place);
    }
    Ok(place)
}

/// Checks that no two files of a checkpoint would be written to the same file.
fn check_file_names(newest: &CheckpointModel) -> Result<()> {
    let mut taken = BTreeMap::new();
    for path in &newest.found.files {
        let name = newest.found.name_of(path);
        let written = safetensors_name(&name);
        if let Some(other) = taken.insert(written.clone(), name.clone()) {
            let why = format!("`{other}` and `{name}` would both be written as `{written}`: name a file to write to");
            return Err(Error::unexpected(&newest.found.path, why));
        }
    }
    Ok(())
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
    newest: &CheckpointModel,
    outputs: &[MergeOutput<'_>],
    options: &WriteOptions<'_>,
) -> Result<Device> {
    // Looked for first, so that an error comes before the blend.
    let index_permissions = index_permissions(newest, checkpoints.follow_links)?;
    let auxiliary = match &newest.found.folder {
        Some(folder) if outputs[0].folder => {
            auxiliary_files::find_all(folder, options.dtype, checkpoints.follow_links)?
        }
        _ => Vec::new(),
    };
    let mut folders = Vec::new();
    for output in outputs.iter().filter(|output| output.folder) {
        folders.push(AtomicFolder::create(output.path, "average")?);
    }
    let mut created = Vec::new();
    for parent in outputs.iter().filter_map(|output| output.path.parent()) {
        created.push(CreatedDirs::parents(parent)?);
    }
    // Dropped after an error, the inner directories are removed first.
    created.reverse();
    let sources = checkpoints.source_set();
    let (shards, files): (Shards, Vec<Vec<OutputFile>>) = if folders.is_empty() {
        let files = outputs.iter().map(|output| vec![single_file(newest, output)]).collect();
        (Shards::single(&sources, options.dtype)?, files)
    } else {
        let dirs = folders.iter().map(AtomicFolder::path);
        let files: Vec<Vec<OutputFile>> =
            outputs.iter().zip(dirs).map(|(output, dir)| files_in_folder(newest, output, dir)).collect();
        for dir in files.iter().flatten().filter_map(|file| file.path.parent()) {
            fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        }
        (Shards::new(&sources, options.dtype, tensors_by_file(&sources, newest), name_in_file)?, files)
    };
    let rows: Vec<&MergeRow> = outputs.iter().map(|output| &output.row).collect();
    let scratch = Some(&files[0][0].path).filter(|path| !Stream::is_named(path)).map(|path| parent_dir(path));
    let mapped = MappedModels::new(checkpoints, &rows, scratch, options.progress.unwrap_or(&|_| ()))?;
    let written = sources.write_files(&mapped.selection(&rows), &shards, &files, options);
    let device = written.map_err(|error| mapped.blame(error))?;
    drop(mapped);
    for folder in &folders {
        if let Some(permissions) = &index_permissions {
            write_index(folder.path(), newest, shards.data_len(newest.found.own_files), permissions)?;
        }
        auxiliary_files::write_all(folder.path(), &auxiliary)?;
    }
    folders.into_iter().try_for_each(AtomicFolder::commit)?;
    created.into_iter().try_for_each(CreatedDirs::keep)?;
    Ok(device)
}

/// Returns the tensors of each file, as indices into the set.
fn tensors_by_file(sources: &SourceSet<'_>, model: &CheckpointModel) -> Vec<Vec<usize>> {
    let mut tensors = vec![Vec::new(); model.files.len()];
    for (i, tensor) in sources.tensors.iter().enumerate() {
        if let Some(entry) = model.tensors.get(&tensor.name) {
            tensors[entry.file].push(i);
        }
    }
    tensors
}

fn single_file(newest: &CheckpointModel, output: &MergeOutput) -> OutputFile {
    let carried = newest.files.iter().flat_map(|file| file.metadata()).collect();
    OutputFile { path: output.path.to_owned(), metadata: metadata(carried, output.merge) }
}

fn files_in_folder(newest: &CheckpointModel, output: &MergeOutput, dir: &Path) -> Vec<OutputFile> {
    let mut files = Vec::with_capacity(newest.files.len());
    for (file, path) in newest.files.iter().zip(&newest.found.files) {
        let path = dir.join(safetensors_name(&newest.found.name_of(path)));
        files.push(OutputFile { path, metadata: metadata(file.metadata(), output.merge) });
    }
    files
}

/// Returns the metadata of an average: those of the newest checkpoint, with the profile and the step.
fn metadata(mut carried: BTreeMap<String, String>, merge: &Merge) -> BTreeMap<String, String> {
    carried.retain(|key, _| !NOT_CARRIED.contains(&key.as_str()));
    for (key, value) in base_strings() {
        carried.entry(key).or_insert(value);
    }
    carried.insert(PROFILE.into(), profile_json(&merge.profile));
    carried.insert(STEP.into(), merge.at.to_string());
    carried
}

/// Returns the permissions of a checkpoint's index; `None` if it has none. Its metadata are copied into the average's.
///
/// # Errors
/// [`Error::Unexpected`] if the index is a link that leads out of the checkpoint's folder, and [`Error::Io`].
fn index_permissions(newest: &CheckpointModel, follow_links: bool) -> Result<Option<Permissions>> {
    match (&newest.found.index, &newest.found.folder) {
        (Some((path, _)), Some(folder)) => {
            let place = CopySource::new(folder, follow_links)?.resolve(path)?;
            Ok(Some(check_regular(&place)?.permissions()))
        }
        _ => Ok(None),
    }
}

/// Writes the index of an average's shards, if the checkpoint has one.
fn write_index(dir: &Path, newest: &CheckpointModel, total_size: usize, permissions: &Permissions) -> Result<()> {
    let Some((path, index)) = &newest.found.index else { return Ok(()) };
    let files: Vec<String> =
        newest.found.files.iter().map(|path| safetensors_name(&newest.found.name_of(path))).collect();
    let tensors = newest.tensors.iter().filter(|(_, entry)| entry.file < newest.found.own_files);
    let weight_map = tensors.map(|(name, entry)| (name.clone(), files[entry.file].clone())).collect();
    let name = file_name(path);
    let (stem, ending) = split_index(&name).unwrap_or((&name, INDEX_SUFFIX));
    let path = dir.join(format!("{}{ending}", safetensors_name(stem)));
    auxiliary_files::write(&path, index.with_tensors(weight_map, total_size).to_json().as_bytes(), permissions)
}
