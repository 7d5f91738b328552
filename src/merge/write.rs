//! Averages to files, and to folders like those of the checkpoints.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::Checkpoints;
use super::companions::{self, Companion};
use super::find::{Input, name};
use super::index::INDEX;
use super::mapped::Mapped;
use super::model::Model;
use super::plan::{Merge, Row, row};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::fs::{AtomicFolder, CreatedDirs, check_vacant};

use crate::snapshot::{PROFILE, STEP, base_strings};
use crate::synthesis::{MAX_TARGETS, OutputFile, Shards, SourceSet, WriteOptions, check_device, check_distinct};

use crate::planning::profile_json;

/// Entries of metadata that tell of the data's bits, and those of a snapshot: an average's are others.
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

/// One average to be written.
struct Job<'a> {
    merge: &'a Merge,
    path: &'a Path,
    row: Row,
    /// Whether it is a folder.
    folder: bool,
}

/// Writes averages in as few passes as can be: one, where all have the same newest checkpoint.
pub(super) fn write(
    checkpoints: &Checkpoints,
    outputs: &[(&Merge, &Path)],
    options: &WriteOptions<'_>,
) -> Result<Device> {
    let places: Vec<PathBuf> = outputs.iter().map(|(_, path)| resolve(path)).collect::<Result<_>>()?;
    check_distinct(places.iter().map(PathBuf::as_path))?;
    options.check()?;
    let mut jobs = Vec::with_capacity(outputs.len());
    for &(merge, path) in outputs {
        let row = row(checkpoints, merge)?;
        let newest = &checkpoints.models[row.newest];
        let folder = is_folder(newest, path);
        check_place(checkpoints, path, folder)?;
        if folder {
            check_names(newest)?;
        }
        jobs.push(Job { merge, path, row, folder });
    }
    let mut device = check_device(options.device)?;
    for group in jobs.chunk_by(|a, b| (a.row.newest, a.folder) == (b.row.newest, b.folder)) {
        let newest = &checkpoints.models[group[0].row.newest];
        for jobs in group.chunks((MAX_TARGETS / newest.parts.len()).max(1)) {
            device = pass(checkpoints, newest, jobs, options)?;
        }
    }
    match jobs.is_empty() {
        true => Err(Error::NoTarget),
        false => Ok(device),
    }
}

/// An average of folders is a folder, unless it is called a file.
fn is_folder(newest: &Model, path: &Path) -> bool {
    newest.input.folder.is_some() && path.extension().is_none_or(|extension| extension != "safetensors")
}

/// Checks that nothing is written into an input or over it, nor a folder over anything.
fn check_place(checkpoints: &Checkpoints, path: &Path, folder: bool) -> Result<()> {
    let place = resolve(path)?;
    let files = checkpoints.models.iter().flat_map(|model| &model.input.parts);
    // An index that was named has a folder that may hold anything else, too.
    let own = |model: &&Model| model.input.folder.as_ref() == Some(&model.input.path);
    let mut folders = checkpoints.models.iter().filter(own).map(|model| &model.input.path).chain(&checkpoints.named);
    if files.map(|file| resolve(file)).any(|file| file.is_ok_and(|file| file == place)) {
        return Err(Error::unexpected(
            path,
            "this is one of the checkpoints, which are left untouched: write elsewhere",
        ));
    }
    if let Some(inner) = folders.find(|dir| resolve(dir).is_ok_and(|dir| place.starts_with(dir))) {
        let why = format!("this lies in {}, which is left untouched: write elsewhere", inner.display());
        return Err(Error::unexpected(path, why));
    }
    if folder { check_vacant(path) } else { Ok(()) }
}

/// The absolute path, links resolved as far as it exists, and `..` where it does not: the directories will then be plain ones.
fn resolve(path: &Path) -> Result<PathBuf> {
    let mut place = PathBuf::new();
    for part in std::path::absolute(path).map_err(Error::io("find", path))?.components() {
        match part {
            Component::ParentDir => {
                place.pop();
            }
            part => place.push(part),
        }
        place = place.canonicalize().unwrap_or(place);
    }
    Ok(place)
}

/// Checks that no two files of a checkpoint would become one.
fn check_names(newest: &Model) -> Result<()> {
    let mut taken = BTreeMap::new();
    for part in &newest.input.parts {
        if let Some(other) = taken.insert(safe_name(&name(part)), name(part)) {
            let own = name(part);
            let why = format!(
                "`{other}` and `{own}` would both be written as `{}`: name a file to write to",
                safe_name(&own)
            );
            return Err(Error::unexpected(&newest.input.path, why));
        }
    }
    Ok(())
}

/// Writes averages that have one newest checkpoint and are all files or all folders.
fn pass(checkpoints: &Checkpoints, newest: &Model, jobs: &[Job<'_>], options: &WriteOptions<'_>) -> Result<Device> {
    let pool = checkpoints.pool();
    // What cannot be read is told before anything is blended.
    let companions = match &newest.input.folder {
        Some(folder) if jobs[0].folder => companions::read(folder, options.dtype)?,
        _ => Vec::new(),
    };
    let folders = jobs.iter().filter(|job| job.folder).map(|job| AtomicFolder::create(job.path, "average"));
    let folders: Vec<AtomicFolder> = folders.collect::<Result<_>>()?;
    let mut made: Vec<CreatedDirs> =
        jobs.iter().filter_map(|job| job.path.parent()).map(CreatedDirs::parents).collect::<Result<_>>()?;
    // Dropped, the inner ones go first.
    made.reverse();
    let shards = match folders.first() {
        Some(_) => Shards::new(&pool, options.dtype, parts(&pool, newest))?,
        None => Shards::single(&pool, options.dtype)?,
    };
    let heads: Vec<Vec<OutputFile>> = match folders.as_slice() {
        [] => jobs.iter().map(|job| vec![whole_head(newest, job)]).collect(),
        folders => jobs.iter().zip(folders).map(|(job, folder)| part_heads(newest, job, folder.path())).collect(),
    };
    let rows: Vec<&Row> = jobs.iter().map(|job| &job.row).collect();
    let scratch = heads[0][0].path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mapped = Mapped::new(checkpoints, &rows, Some(scratch), options.progress.unwrap_or(&|_| ()))?;
    let written = pool.write_files(&mapped.selection(&rows), &shards, &heads, options);
    let device = written.map_err(|error| mapped.blame(error))?;
    drop(mapped);
    for folder in &folders {
        finish(folder.path(), newest, shards.data_len(), &companions)?;
    }
    folders.into_iter().try_for_each(AtomicFolder::commit)?;
    made.into_iter().try_for_each(CreatedDirs::keep)?;
    Ok(device)
}

/// The tensors of each part, as indices of the pool.
fn parts(pool: &SourceSet<'_>, model: &Model) -> Vec<Vec<usize>> {
    let mut parts = vec![Vec::new(); model.parts.len()];
    for (i, tensor) in pool.tensors.iter().enumerate() {
        if let Some(held) = model.tensors.get(&tensor.name) {
            parts[held.part].push(i);
        }
    }
    parts
}

fn whole_head(newest: &Model, job: &Job<'_>) -> OutputFile {
    let carried = newest.parts.iter().flat_map(|part| part.metadata()).collect();
    OutputFile { path: job.path.to_owned(), metadata: metadata(carried, job.merge) }
}

fn part_heads(newest: &Model, job: &Job<'_>, dir: &Path) -> Vec<OutputFile> {
    let head = |(part, path): (&super::model::Part, &PathBuf)| OutputFile {
        path: dir.join(safe_name(&name(path))),
        metadata: metadata(part.metadata(), job.merge),
    };
    newest.parts.iter().zip(&newest.input.parts).map(head).collect()
}

/// The metadata of an average: the newest checkpoint's, and what the average is.
fn metadata(mut carried: BTreeMap<String, String>, merge: &Merge) -> BTreeMap<String, String> {
    carried.retain(|key, _| !NOT_CARRIED.contains(&key.as_str()));
    for (key, value) in base_strings() {
        carried.entry(key).or_insert(value);
    }
    carried.insert(PROFILE.into(), profile_json(&merge.profile));
    carried.insert(STEP.into(), merge.at.to_string());
    carried
}

/// What a file of weights is called as a safetensors file: where it was one of PyTorch's, as Hugging Face's tools have it.
fn safe_name(name: &str) -> String {
    let (stem, extension) = name.rsplit_once('.').unwrap_or((name, ""));
    if extension == "safetensors" {
        return name.to_owned();
    }
    let stem = stem.strip_prefix("pytorch_model").map_or(stem.to_owned(), |rest| format!("model{rest}"));
    format!("{stem}.safetensors")
}

/// Adds the index and the files that belong to the model.
fn finish(dir: &Path, newest: &Model, total_size: usize, companions: &[Companion]) -> Result<()> {
    let Input { index, parts, .. } = &newest.input;
    if let Some(index) = index {
        let files: Vec<String> = parts.iter().map(|path| safe_name(&name(path))).collect();
        let files = newest.tensors.values().map(|held| files[held.part].as_str());
        let map = newest.tensors.keys().map(String::as_str).zip(files).collect();
        let stem = name(&index.path);
        let called = format!("{}{INDEX}", safe_name(stem.strip_suffix(INDEX).unwrap_or(&stem)));
        companions::write(&dir.join(called), &index.with(&map, total_size))?;
    }
    companions::write_all(dir, companions)
}
