//! The tensors that every checkpoint of an import holds.

use std::collections::BTreeSet;
use std::path::Path;

use safetensors::Dtype;

use super::layout::{CheckpointLayout, ParsedCheckpoint};
use crate::error::{Difference, Error, Result};
use crate::pytorch::Checkpoint;
use crate::tensor::{TensorSpec, compare_tensors, is_averaged};

/// Tensors of all checkpoints of an import, in order of their names.
pub(super) struct ImportTensors {
    pub layout: CheckpointLayout,
    /// Dtypes and shapes in the files, under the model's names.
    pub specs: Vec<TensorSpec>,
    /// Name of each tensor in the files.
    pub keys: Vec<String>,
    /// Batch counters, which are whole numbers in the model.
    pub counters: BTreeSet<String>,
    /// Tensors that the tool copied instead of averaging.
    pub copied: BTreeSet<String>,
}

impl ImportTensors {
    /// Returns the tensors of one checkpoint.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for complex ones, and for floating-point ones of 8 bits.
    pub(super) fn new(checkpoint: &Checkpoint, parsed: &ParsedCheckpoint) -> Result<ImportTensors> {
        let mut specs = Vec::with_capacity(parsed.keys.len());
        for (name, key) in &parsed.keys {
            let spec = checkpoint.spec(key)?;
            if !is_averaged(spec.dtype) && spec.dtype.to_string().starts_with(['F', 'C']) {
                let why =
                    format!("`{key}` is a tensor of {}, which cannot be averaged and so not imported", spec.dtype);
                return Err(Error::unexpected(checkpoint.path(), why));
            }
            specs.push(TensorSpec { name: name.clone(), ..spec });
        }
        Ok(ImportTensors {
            layout: parsed.layout,
            specs,
            keys: parsed.keys.values().cloned().collect(),
            counters: BTreeSet::new(),
            copied: BTreeSet::new(),
        })
    }

    /// Iterates over the tensors, each with its name in the files.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&TensorSpec, &str)> {
        self.specs.iter().zip(self.keys.iter().map(String::as_str))
    }

    /// Checks that another checkpoint has the same layout and tensors.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for other names, shapes or dtypes.
    pub(super) fn check_sibling(&self, path: &Path, sibling: &ImportTensors, sibling_path: &Path) -> Result<()> {
        if self.layout != sibling.layout {
            let difference = Difference::new("the layout of the entries", sibling.layout, self.layout);
            return Err(Error::mismatch(path, sibling_path, difference));
        }
        match compare_tensors(borrow(&self.specs), borrow(&sibling.specs)) {
            Some(difference) => Err(Error::mismatch(path, sibling_path, difference)),
            None => Ok(()),
        }
    }

    /// Removes tensors by name.
    pub(super) fn leave_out(&mut self, names: &BTreeSet<String>) {
        let specs = std::mem::take(&mut self.specs);
        let keys = std::mem::take(&mut self.keys);
        let kept = specs.into_iter().zip(keys).filter(|(spec, _)| !names.contains(&spec.name));
        (self.specs, self.keys) = kept.unzip();
    }

    /// Returns the tensors of a snapshot.
    pub(super) fn stored_specs(&self) -> Vec<TensorSpec> {
        let mut specs = self.specs.clone();
        for spec in specs.iter_mut().filter(|spec| self.counters.contains(&spec.name)) {
            spec.dtype = Dtype::I64;
        }
        specs
    }
}

fn borrow(specs: &[TensorSpec]) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
    specs.iter().map(|spec| (spec.name.as_str(), spec.dtype, spec.shape.as_slice()))
}
