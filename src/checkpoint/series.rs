//! Checkpoints that are imported and not averaged: several entries of the same files, each a series of its own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::find::{file_name, find_all_in_folder, find_one, is_pytorch};
use super::model::CheckpointModel;
use super::set_aside::without_recovery;
use super::{CheckpointOptions, OpenedCheckpoints, open_found, wrappers};
use crate::error::{Difference, Error, Result, listed};
use crate::synthesis::{Elements, TensorSource};
use crate::tensor::is_averaged;

/// One entry of some checkpoints.
#[derive(Clone, Debug)]
pub(crate) struct CheckpointSeries {
    pub paths: Vec<PathBuf>,
    /// Key of the entry; `None` if the files hold one model.
    pub key: Option<String>,
    /// Steps in the order of the paths; by default they are read.
    pub steps: Option<Vec<u64>>,
}

/// Lists the checkpoints in a folder, with notes on those that are left out if there are others: names without a
/// number, which repeat another checkpoint, such as `last.ckpt`, and files that were saved within an epoch.
///
/// # Errors
/// As [`Checkpoints::open`](crate::Checkpoints::open).
pub(crate) fn list_checkpoints(dir: &Path) -> Result<(Vec<PathBuf>, Vec<String>)> {
    let paths: Vec<PathBuf> = find_all_in_folder(dir)?.into_iter().map(|found| found.path).collect();
    let (paths, recovery) = without_recovery(paths);
    let mut notes: Vec<String> = recovery.into_iter().collect();
    let has_number = |path: &PathBuf| file_name(path).contains(|c: char| c.is_ascii_digit());
    if !paths.iter().any(has_number) {
        return Ok((paths, notes));
    }
    let (numbered, others): (Vec<PathBuf>, Vec<PathBuf>) = paths.into_iter().partition(has_number);
    if !others.is_empty() {
        let names: Vec<String> = others.iter().map(|path| file_name(path)).collect();
        notes.push(format!("left out, without a number in the name: {}", listed(&names)));
    }
    Ok((numbered, notes))
}

/// Returns true for a file of PyTorch, by its name.
pub(crate) fn is_pytorch_file(path: &Path) -> bool {
    path.is_file() && is_pytorch(path)
}

/// Opens series of one model. Their tensors have the same names and shapes; averaged ones may differ in their dtype.
///
/// # Errors
/// As [`Checkpoints::open_with`](crate::Checkpoints::open_with).
pub(crate) fn open_series(series: &[CheckpointSeries], options: &CheckpointOptions) -> Result<Vec<OpenedCheckpoints>> {
    let mut opened = Vec::with_capacity(series.len());
    for one in series {
        let found = one.paths.iter().map(|path| find_one(path)).collect::<Result<_>>()?;
        let options = CheckpointOptions { steps: one.steps.clone(), key: one.key.clone(), ..options.clone() };
        opened.push(open_found(found, &options)?);
    }
    look_through(&mut opened);
    if let Some((first, others)) = opened.split_first() {
        others.iter().try_for_each(|other| check_same_tensors(&first.models[0], &other.models[0]))?;
    }
    Ok(opened)
}

/// Looks through the prefixes of wrappers in which series differ.
fn look_through(opened: &mut [OpenedCheckpoints]) {
    let counts: Vec<usize> = opened.iter().map(|checkpoints| checkpoints.models.len()).collect();
    let mut models: Vec<CheckpointModel> =
        opened.iter_mut().flat_map(|checkpoints| std::mem::take(&mut checkpoints.models)).collect();
    let note = wrappers::look_through(&mut models);
    let mut models = models.into_iter();
    for (checkpoints, count) in opened.iter_mut().zip(counts) {
        checkpoints.models = models.by_ref().take(count).collect();
    }
    if let Some(first) = opened.first_mut() {
        first.notes.extend(note);
    }
}

/// Checks that two series are of one model.
///
/// # Errors
/// [`Error::Mismatch`] for other names or shapes, and for another dtype of a tensor that is copied.
fn check_same_tensors(first: &CheckpointModel, other: &CheckpointModel) -> Result<()> {
    let mismatch = |difference| Err(Error::mismatch(&other.found.path, &first.found.path, difference));
    let names: BTreeSet<&String> = first.tensors.keys().chain(other.tensors.keys()).collect();
    for name in names {
        let text = |model: &CheckpointModel| match model.tensors.get(name) {
            Some(entry) if model.is_averaged(name) => format!("averaged, of the shape {:?}", entry.shape),
            Some(entry) => format!("copied, {} of the shape {:?}", entry.dtype, entry.shape),
            None => "missing".to_owned(),
        };
        let (own, others) = (text(first), text(other));
        if own != others {
            return mismatch(Difference::new(format!("tensor `{name}`"), own, others));
        }
    }
    Ok(())
}

/// Tensor of a series, without its elements.
pub(crate) struct SeriesTensor<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub averaged: bool,
    /// True for a floating-point tensor that is not averaged.
    pub copied: bool,
}

impl OpenedCheckpoints {
    /// Lists the tensors of each checkpoint, in order of their names.
    pub(crate) fn series_tensors(&self) -> Vec<SeriesTensor<'_>> {
        let first = &self.models[0];
        let mut tensors = Vec::with_capacity(first.tensors.len());
        for (name, entry) in &first.tensors {
            let averaged = first.is_averaged(name);
            tensors.push(SeriesTensor {
                name,
                dtype: entry.dtype,
                shape: &entry.shape,
                averaged,
                copied: is_averaged(entry.dtype) && !averaged,
            });
        }
        tensors
    }

    /// Returns the elements of a tensor of the checkpoint with index `i`, in C order.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the tensor is missing.
    pub(crate) fn elements(&self, i: usize, name: &str) -> Result<Elements<'_>> {
        let model = &self.models[i];
        let missing = || Error::unexpected(&model.found.path, format!("it has no tensor `{name}`"));
        model.stored(name).map(|(_, elements)| elements).ok_or_else(missing)
    }

    /// Returns the file or folder of each checkpoint.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.models.iter().map(|model| model.found.path.as_path())
    }

    /// Returns the path of the checkpoint with index `i`.
    pub(crate) fn path(&self, i: usize) -> &Path {
        &self.models[i].found.path
    }
}
