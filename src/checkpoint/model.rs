//! A checkpoint, opened: its tensors, in whichever of its files they are.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use super::find::{FoundCheckpoint, file_name, safetensors_name, without_extension};
use super::options::{AdapterProduct, ReadOptions};
use super::weight_file::WeightFile;
use super::{adapter, model_config};
use crate::error::{Error, Result, shown};
use crate::synthesis::{Elements, TensorSource};
use crate::tensor::{TensorSpec, compare_tensors, is_averaged};

/// Checkpoint whose files are open.
#[derive(Debug)]
pub(crate) struct CheckpointModel {
    pub found: FoundCheckpoint,
    /// In the order of the files found.
    pub files: Vec<WeightFile>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Names of tensors and other entries that were left out.
    pub left_out: Vec<String>,
}

/// Tensor of a checkpoint.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Index of the file that holds it.
    pub file: usize,
    /// Name in that file.
    pub stored_name: String,
    /// True if the user asked for the newest one instead of an average.
    pub copied: bool,
}

impl TensorEntry {
    /// Returns the size of the elements in bytes.
    ///
    /// It cannot overflow, as the file was checked to hold the elements.
    pub(crate) fn bytes(&self) -> u64 {
        (self.dtype.bitsize() * self.shape.iter().product::<usize>() / 8) as u64
    }
}

impl CheckpointModel {
    /// Opens all files of a checkpoint and checks them against each other.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`], and [`Error::Unexpected`] for files that are not a checkpoint of a model.
    pub(super) fn open(mut found: FoundCheckpoint, options: &ReadOptions) -> Result<CheckpointModel> {
        let mut files = Vec::with_capacity(found.files.len());
        let mut tensors = BTreeMap::new();
        let mut left_out = Vec::new();
        for path in std::mem::take(&mut found.files) {
            let file = WeightFile::open(&path, options)?;
            let i = files.len();
            let before = tensors.len();
            left_out.extend_from_slice(file.left_out());
            for TensorSpec { name, dtype, shape } in file.specs() {
                let stored_name = name;
                let name = if i < found.own_files {
                    stored_name.clone()
                } else {
                    name_beside(&found.name_of(&path), &stored_name)
                };
                if options.leave_out.contains(&name) {
                    left_out.push(name);
                    continue;
                }
                let entry = TensorEntry { dtype, shape, file: i, stored_name, copied: options.copy.contains(&name) };
                check_dtype(&path, &name, &entry)?;
                if tensors.insert(name.clone(), entry).is_some() {
                    return Err(Error::damaged(&path, format!("tensor `{name}` is in another shard too")));
                }
            }
            // The average has no file for weights beside the model if all of them were left out.
            if i < found.own_files || tensors.len() > before {
                files.push(file);
                found.files.push(path);
            }
        }
        let model = CheckpointModel { found, files, tensors, left_out };
        model.check_index()?;
        if model.tensors.is_empty() {
            return Err(Error::unexpected(&model.found.path, "it holds no tensor: leave it out"));
        }
        Ok(model)
    }

    /// Checks that each tensor is in the file that the index names, and that the index names all.
    fn check_index(&self) -> Result<()> {
        let Some((path, index)) = &self.found.index else { return Ok(()) };
        for (name, file) in index.weight_map() {
            let entry = self.tensors.get(name);
            if self.left_out.contains(name) {
                continue;
            }
            if !entry.is_some_and(|entry| self.found.files[entry.file].ends_with(file)) {
                return Err(Error::damaged(path, format!("tensor `{name}` is not in `{file}`, as the index has it")));
            }
        }
        for (name, entry) in self.tensors.iter().filter(|(_, entry)| entry.file < self.found.own_files) {
            if !index.weight_map().contains_key(name) {
                let index = file_name(path);
                let why = format!(
                    "it holds the tensor `{name}`, which {index} does not name: the files are of different saves; copy \
                     all files of one save, or leave it out with --leave-out (`leave_out`)"
                );
                return Err(Error::unexpected(&self.found.files[entry.file], why));
            }
        }
        Ok(())
    }

    /// Returns a number of the metadata on which all files that have it agree.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        let mut numbers = self.files.iter().filter_map(|file| file.number(key));
        let first = numbers.next()?;
        numbers.all(|other| other == first).then_some(first)
    }

    /// Checks that another checkpoint is of the same model, with the same scales of adapters.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for other names, shapes or dtypes, [`Error::Unexpected`] for other scales.
    pub(super) fn check_sibling(&self, other: &CheckpointModel, options: &ReadOptions) -> Result<()> {
        if let Some(difference) = compare_tensors(self.specs(), other.specs()) {
            return Err(Error::mismatch(&self.found.path, &other.found.path, difference));
        }
        let product = options.product;
        for name in self.tensors.keys().filter(|name| self.is_scale(name)) {
            if product == AdapterProduct::Factors && self.scale(name) != other.scale(name) {
                let why = format!(
                    "`{name}`, the scale of a low-rank adapter, differs from that in {}: {}",
                    shown(&other.found.path),
                    adapter::REMEDY
                );
                return Err(Error::unexpected(&self.found.path, why));
            }
        }
        let [own, others] = [self.metadata(), other.metadata()];
        adapter::check_metadata((&self.found.path, &own), (&other.found.path, &others), product)?;
        adapter::check_configs(&self.found, &other.found, product)?;
        model_config::check(&self.found, &other.found, &options.ignore_config)
    }

    /// Returns the strings of all files' metadata.
    pub(super) fn metadata(&self) -> BTreeMap<String, String> {
        self.files.iter().flat_map(|file| file.metadata()).collect()
    }

    /// Returns true if another checkpoint has the same tensors with the same elements.
    pub(super) fn is_same(&self, other: &CheckpointModel) -> bool {
        compare_tensors(self.specs(), other.specs()).is_none()
            && self.tensors.keys().all(|name| match (self.stored(name), other.stored(name)) {
                (Some((_, own)), Some((_, others))) => own.equals(others),
                _ => false,
            })
    }

    fn specs(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry.dtype, entry.shape.as_slice()))
    }

    /// Checks that there is a tensor to average.
    ///
    /// # Errors
    /// [`Error::Unexpected`].
    pub(super) fn check_averaged(&self) -> Result<()> {
        if self.tensors.keys().any(|name| self.is_averaged(name)) {
            return Ok(());
        }
        let why =
            "none of its tensors is of floating point, so there is nothing to average: name checkpoints of a model";
        Err(Error::unexpected(&self.found.path, why))
    }

    /// Returns true if a tensor is averaged: it is of floating point, not the scale of a low-rank adapter, and the user
    /// did not ask for a copy.
    pub(crate) fn is_averaged(&self, name: &str) -> bool {
        let is_candidate = self.tensors.get(name).is_some_and(|entry| is_averaged(entry.dtype) && !entry.copied);
        is_candidate && !self.is_scale(name)
    }

    /// Returns true if a tensor is the scale of a low-rank adapter.
    fn is_scale(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|entry| adapter::may_be_scale(name, &entry.shape))
            && adapter::has_factors(&self.tensors, name)
    }

    /// Returns the elements of an adapter's scale.
    pub(super) fn scale(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.stored(name).map(|(_, elements)| elements.to_bytes())
    }

    /// Returns true if two tensors share their elements in the file.
    pub(crate) fn share_elements(&self, a: &str, b: &str) -> bool {
        match (self.stored(a), self.stored(b)) {
            (Some((_, Elements::Host(a))), Some((_, Elements::Host(b)))) => !a.is_empty() && std::ptr::eq(a, b),
            _ => false,
        }
    }

    /// Returns true if two matrices are equal, as those of tied layers are in files that hold both.
    pub(crate) fn equal_matrices(&self, a: &str, b: &str) -> bool {
        let is_matrix = |name| self.tensors.get(name).is_some_and(|entry| entry.shape.len() > 1);
        let shape = |name| self.tensors.get(name).map(|entry| &entry.shape);
        let (Some((dtype, left)), Some((other, right))) = (self.stored(a), self.stored(b)) else { return false };
        is_matrix(a) && dtype == other && shape(a) == shape(b) && left.equals(right)
    }
}

impl TensorSource for CheckpointModel {
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        let entry = self.tensors.get(name)?;
        Some((entry.dtype, self.files[entry.file].elements(&entry.stored_name)?))
    }

    fn will_need(&self, bytes: &[u8]) {
        self.files.iter().for_each(|file| file.will_need(bytes));
    }
}

/// Separates the file of weights beside the model from a tensor's name in it.
const BESIDE: &str = ".safetensors/";

/// Returns the name of a tensor of weights beside the model: that in the file, after the file's.
fn name_beside(file: &str, name: &str) -> String {
    let file = safetensors_name(file);
    format!("{}{BESIDE}{name}", without_extension(&file))
}

/// Returns the name of a tensor in its own file.
pub(crate) fn name_in_file(name: &str) -> &str {
    name.split_once(BESIDE).map_or(name, |(_, name)| name)
}

/// Refuses floating-point dtypes that are too coarse for averages; they would otherwise be copied like integers.
fn check_dtype(path: &Path, name: &str, entry: &TensorEntry) -> Result<()> {
    let dtype = entry.dtype;
    if entry.copied || is_averaged(dtype) || !dtype.to_string().starts_with(['F', 'C']) {
        return Ok(());
    }
    let why = format!(
        "tensor `{name}` is of {dtype}, which cannot be averaged: copy it with --copy (`copy`), leave it out with \
         --leave-out (`leave_out`), or average f32, f16, bf16 or f64 and convert the average"
    );
    Err(Error::unexpected(path, why))
}
