//! Layout of an average: its files, their tensors, its index, and the model's other files.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::path::PathBuf;

use safetensors::Dtype;

use super::fit::{IsTied, fit};
use super::form::OutputForm;
use super::named::NamedTensors;
use super::shard_names::{ShardNames, split};
use crate::checkpoint::auxiliary_files::{self, AuxiliaryFile};
use crate::checkpoint::{CheckpointModel, CopySource, file_name, name_in_file, safetensors_name, split_index};
use crate::error::{Error, Result};
use crate::fs::check_regular;
use crate::snapshot::{INDEX_SUFFIX, ShardIndex, base_strings};
use crate::synthesis::{MAX_TARGETS, ShardTensor, Shards, SourceSet};

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

/// Files of an average, the same for all targets.
pub(crate) struct FilePlan {
    pub shards: Shards,
    /// True if the average is a folder, false for a single file.
    pub is_folder: bool,
    /// Notes on tensors that are called otherwise, or are not written.
    pub notes: Vec<String>,
    /// Name of the kept tensor for each tied one, in files that record it.
    pub tied: BTreeMap<String, String>,
    pub(super) files: Vec<PlannedFile>,
    pub(super) index: Option<PlannedIndex>,
    pub(super) auxiliary: Vec<AuxiliaryFile>,
}

/// Name of a file in the folder, and its metadata without those of a target.
pub(super) struct PlannedFile {
    pub name: String,
    pub metadata: BTreeMap<String, String>,
}

/// Index of the shards.
pub(super) struct PlannedIndex {
    pub name: String,
    pub index: ShardIndex,
    /// Permissions of the index that it is made after.
    pub permissions: Option<Permissions>,
}

/// Average whose files are planned.
pub(crate) struct Averaged<'a> {
    pub set: &'a SourceSet<'a>,
    /// Checkpoint whose folder is the example, unless the form names one.
    pub example: Option<&'a CheckpointModel>,
    /// True if a folder is written without a form that asks for one.
    pub is_folder: bool,
    /// True if links in the example's folder may lead out of it.
    pub follow_links: bool,
    pub is_tied: IsTied<'a>,
    /// Names of tensors that were left out of the set.
    pub left_out: &'a [String],
}

impl FilePlan {
    /// Plans the files of an average. `dtype` is that of averaged tensors, `None` for that of the folder or the model.
    ///
    /// # Errors
    /// - [`Error::Unexpected`] if the average would not load in the place of the folder's weights, and for links out of
    ///   the folder.
    /// - [`Error::Setting`] for rules, patterns and sizes that do not fit.
    /// - [`Error::Io`], [`Error::Damaged`] and [`Error::Tensor`].
    pub(crate) fn new(averaged: &Averaged<'_>, form: &OutputForm, dtype: Option<Dtype>) -> Result<FilePlan> {
        let Averaged { set, example, is_tied, left_out, .. } = *averaged;
        let mut notes = Vec::new();
        let mut tied = BTreeMap::new();
        let files = match &form.like {
            Some(like) => {
                let fit = fit(set, left_out, form, like, dtype, is_tied)?;
                notes = fit.notes;
                fit.files
            }
            None => {
                let named = NamedTensors::new(set, left_out, form)?;
                let files = files_of_example(set, &named, example.filter(|_| averaged.is_folder), dtype);
                tied = named.tied;
                files
            }
        };
        let is_folder = averaged.is_folder || form.is_folder();
        let follow_links = form.follow_links || averaged.follow_links;
        let example = form.like.as_ref().or(example);
        let example_folder = example.filter(|example| is_folder && example.found.folder.is_some());
        let own = example_folder.map_or(1, |example| example.found.own_files);
        let (parts, files, index) = match (form.shard_size, example_folder) {
            (Some(_), _) => resharded(set, form, example_folder, files, metadata_of(example, own))?,
            (None, Some(example)) => as_example(example, files, follow_links)?,
            (None, None) => {
                let file = PlannedFile { name: String::new(), metadata: metadata_of(example, usize::MAX) };
                (files, vec![file], None)
            }
        };
        let folder = example_folder.and_then(|example| example.found.folder.as_ref());
        let auxiliary = match folder {
            Some(folder) => auxiliary_files::find_all(folder, dtype, follow_links)?,
            None => Vec::new(),
        };
        let own_shards = parts.len() - (example_folder.map_or(1, |example| example.files.len()) - own);
        let weight_map: BTreeMap<String, String> = parts[..own_shards]
            .iter()
            .zip(&files)
            .flat_map(|(part, file)| part.iter().map(|tensor| (tensor.name.clone(), file.name.clone())))
            .collect();
        let shards = Shards::new(set, parts)?;
        let index = index.map(|planned| {
            let index = planned.index.with_tensors(weight_map, shards.data_len(own_shards));
            PlannedIndex { index, ..planned }
        });
        Ok(FilePlan { shards, is_folder, notes, tied, files, index, auxiliary })
    }

    /// Returns the number of targets that are written in one pass.
    pub(crate) fn targets_in_one_pass(&self) -> usize {
        (MAX_TARGETS / self.files.len()).max(1)
    }
}

/// Assigns tensors to the files of an example's folder, or all of them to one file.
fn files_of_example(
    set: &SourceSet<'_>,
    named: &NamedTensors,
    example: Option<&CheckpointModel>,
    dtype: Option<Dtype>,
) -> Vec<Vec<ShardTensor>> {
    let mut files = vec![Vec::new(); example.map_or(1, |example| example.files.len())];
    for (name, &i) in &named.tensors {
        let entry = example.and_then(|example| example.tensors.get(&set.tensors[i].name));
        let name = if example.is_some() { name_in_file(name) } else { name };
        let tensor = ShardTensor { name: name.to_owned(), ..ShardTensor::own(set, i, dtype) };
        files[entry.map_or(0, |entry| entry.file)].push(tensor);
    }
    files
}

type Planned = (Vec<Vec<ShardTensor>>, Vec<PlannedFile>, Option<PlannedIndex>);

/// Plans files with the names of the example's.
fn as_example(example: &CheckpointModel, parts: Vec<Vec<ShardTensor>>, follow_links: bool) -> Result<Planned> {
    let mut taken = BTreeMap::new();
    let mut files = Vec::new();
    for (path, file) in example.found.files.iter().zip(&example.files) {
        let own = example.found.name_of(path);
        let name = safetensors_name(&own);
        if let Some(other) = taken.insert(name.clone(), own.clone()) {
            let why = format!("`{other}` and `{own}` would both be written as `{name}`: name a file to write to");
            return Err(Error::unexpected(&example.found.path, why));
        }
        files.push(PlannedFile { name, metadata: carried(file.metadata()) });
    }
    Ok((parts, files, index_of(example, follow_links)?))
}

/// Plans the index of an example's folder, if it has one.
///
/// # Errors
/// [`Error::Unexpected`] if it is a link that leads out of the folder, and [`Error::Io`].
fn index_of(example: &CheckpointModel, follow_links: bool) -> Result<Option<PlannedIndex>> {
    let (Some((path, index)), Some(folder)) = (&example.found.index, &example.found.folder) else { return Ok(None) };
    let place: PathBuf = CopySource::new(folder, follow_links)?.resolve(path)?;
    let permissions = Some(check_regular(&place)?.permissions());
    let name = file_name(path);
    let (stem, ending) = split_index(&name).unwrap_or((&name, INDEX_SUFFIX));
    let name = format!("{}{ending}", safetensors_name(stem));
    Ok(Some(PlannedIndex { name, index: index.clone(), permissions }))
}

/// Plans shards of the form's size for the model's own tensors. Weights beside them stay in their files.
fn resharded(
    set: &SourceSet<'_>,
    form: &OutputForm,
    example: Option<&CheckpointModel>,
    mut parts: Vec<Vec<ShardTensor>>,
    metadata: BTreeMap<String, String>,
) -> Result<Planned> {
    let own = example.map_or(1, |example| example.found.own_files);
    let beside = parts.split_off(own.min(parts.len()));
    let own_tensors: Vec<ShardTensor> = parts.into_iter().flatten().collect();
    let mut parts = split(set, form, own_tensors);
    let names = ShardNames::new(example, parts.len())?;
    let name_file = |name| PlannedFile { name, metadata: metadata.clone() };
    let mut files: Vec<PlannedFile> = names.files.into_iter().map(name_file).collect();
    if let Some(example) = example.filter(|_| !beside.is_empty()) {
        let rest = example.found.files.iter().zip(&example.files).skip(own);
        files.extend(rest.map(|(path, file)| PlannedFile {
            name: safetensors_name(&example.found.name_of(path)),
            metadata: carried(file.metadata()),
        }));
    }
    parts.extend(beside);
    let like = example.and_then(|example| example.found.index.as_ref()).map(|(_, index)| index.clone());
    let plan_index = |name| PlannedIndex { name, index: like.unwrap_or_default(), permissions: None };
    Ok((parts, files, names.index.map(plan_index)))
}

/// Returns the metadata of an example's first files that hold for the average, too.
fn metadata_of(example: Option<&CheckpointModel>, files: usize) -> BTreeMap<String, String> {
    let files = example.iter().flat_map(|example| example.files.iter().take(files));
    carried(files.flat_map(|file| file.metadata()).collect())
}

/// Returns the metadata of a file that hold for the average, too.
fn carried(mut metadata: BTreeMap<String, String>) -> BTreeMap<String, String> {
    metadata.retain(|key, _| !NOT_CARRIED.contains(&key.as_str()));
    for (key, value) in base_strings() {
        metadata.entry(key).or_insert(value);
    }
    metadata
}
