//! A checkpoint, opened: its tensors, in whichever of its files they are.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use super::adapter;
use super::find::FoundCheckpoint;
use super::weight_file::WeightFile;
use crate::error::{Error, Result, shown};
use crate::synthesis::{Elements, TensorSource};
use crate::tensor::{TensorSpec, compare_tensors, is_averaged};

/// Checkpoint whose files are open.
#[derive(Debug)]
pub(super) struct CheckpointModel {
    pub found: FoundCheckpoint,
    /// In the order of the files found.
    pub files: Vec<WeightFile>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorEntry>,
}

/// Tensor of a checkpoint.
#[derive(Debug)]
pub(super) struct TensorEntry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Index of the file that holds it.
    pub file: usize,
}

impl TensorEntry {
    /// Returns the size of the elements in bytes.
    ///
    /// It cannot overflow, as the file was checked to hold the elements.
    pub(super) fn bytes(&self) -> u64 {
        (self.dtype.bitsize() * self.shape.iter().product::<usize>() / 8) as u64
    }
}

impl CheckpointModel {
    /// Opens all files of a checkpoint and checks them against each other.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`], and [`Error::Unexpected`] for files that are not a checkpoint of a model.
    pub(super) fn open(found: FoundCheckpoint) -> Result<CheckpointModel> {
        let files: Vec<WeightFile> = found.files.iter().map(|path| WeightFile::open(path)).collect::<Result<_>>()?;
        let mut tensors = BTreeMap::new();
        for (i, (file, path)) in files.iter().zip(&found.files).enumerate() {
            for TensorSpec { name, dtype, shape } in file.specs() {
                check_dtype(path, &name, dtype)?;
                if tensors.contains_key(&name) {
                    return Err(Error::damaged(path, format!("tensor `{name}` is in another shard too")));
                }
                tensors.insert(name, TensorEntry { dtype, shape, file: i });
            }
        }
        let model = CheckpointModel { found, files, tensors };
        model.check_index()?;
        if model.tensors.is_empty() {
            return Err(Error::unexpected(&model.found.path, "it holds no tensor: leave it out"));
        }
        Ok(model)
    }

    /// Checks that each tensor is in the file that the index names.
    fn check_index(&self) -> Result<()> {
        let Some((path, index)) = &self.found.index else { return Ok(()) };
        for (name, file) in index.weight_map() {
            let entry = self.tensors.get(name);
            if !entry.is_some_and(|entry| self.found.files[entry.file].ends_with(file)) {
                return Err(Error::damaged(path, format!("tensor `{name}` is not in `{file}`, as the index has it")));
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
    pub(super) fn check_sibling(&self, other: &CheckpointModel) -> Result<()> {
        if let Some(difference) = compare_tensors(self.specs(), other.specs()) {
            return Err(Error::mismatch(&self.found.path, &other.found.path, difference));
        }
        for name in self.tensors.keys().filter(|name| self.is_scale(name)) {
            if self.scale(name) != other.scale(name) {
                let why = format!(
                    "`{name}`, the scale of a low-rank adapter, differs from that in {}: {}",
                    shown(&other.found.path),
                    adapter::REMEDY
                );
                return Err(Error::unexpected(&self.found.path, why));
            }
        }
        adapter::check_configs(&self.found, &other.found)
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

    /// Returns true if a tensor is averaged: it is of floating point and not the scale of a low-rank adapter.
    pub(super) fn is_averaged(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|entry| is_averaged(entry.dtype)) && !self.is_scale(name)
    }

    /// Returns true if a tensor is the scale of a low-rank adapter.
    fn is_scale(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|entry| adapter::may_be_scale(name, &entry.shape))
            && adapter::has_factors(&self.tensors, name)
    }

    /// Returns the elements of an adapter's scale.
    fn scale(&self, name: &str) -> Option<&[u8]> {
        self.files[self.tensors.get(name)?.file].scale(name)
    }

    /// Returns true if all files are mapped.
    pub(super) fn is_mapped(&self) -> bool {
        self.files.iter().all(|file| matches!(file, WeightFile::Mapped(_)))
    }
}

impl TensorSource for CheckpointModel {
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        let entry = self.tensors.get(name)?;
        match &self.files[entry.file] {
            WeightFile::Mapped(file) => Some((entry.dtype, Elements::Host(file.bytes(file.tensors().get(name)?)))),
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(_) => None,
        }
    }

    fn will_need(&self, bytes: &[u8]) {
        for file in &self.files {
            match file {
                WeightFile::Mapped(file) => file.will_need(bytes),
                #[cfg(feature = "pytorch")]
                WeightFile::Torch(_) => {}
            }
        }
    }
}

/// Refuses floating-point dtypes that are too coarse for averages; they would otherwise be copied like integers.
fn check_dtype(path: &Path, name: &str, dtype: Dtype) -> Result<()> {
    if is_averaged(dtype) || !dtype.to_string().starts_with(['F', 'C']) {
        return Ok(());
    }
    let why = format!(
        "tensor `{name}` is of {dtype}, which cannot be averaged: average f32, f16, bf16 or f64 and convert the average"
    );
    Err(Error::unexpected(path, why))
}
