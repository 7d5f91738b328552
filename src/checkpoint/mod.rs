//! Checkpoints of any tool: found, opened, and checked against each other.

mod adapter;
pub(crate) mod auxiliary_files;
#[cfg(feature = "pytorch")]
mod distributed;
mod factors;
mod find;
mod json;
mod links;
mod model;
mod model_config;
mod names;
mod natural;
mod non_finite;
mod notes;
mod options;
mod parts;
mod quantized;
mod repeated;
#[cfg(feature = "pytorch")]
mod series;
mod set_aside;
mod settings;
#[cfg(feature = "pytorch")]
mod sharded;
mod steps;
mod weight_file;
mod wrappers;
mod yaml;

use std::path::Path;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::fs::start_threads;

use find::FoundCheckpoint;
use options::ReadOptions;

pub(crate) use factors::{Adapters, FactorPair};
pub(crate) use find::{file_name, is_usual_name, safetensors_name, split_index, without_extension};
#[cfg(feature = "pytorch")]
pub(crate) use json::read as read_json;
pub(crate) use links::CopySource;
pub(crate) use model::{CheckpointModel, name_in_file};
pub(crate) use non_finite::first_odd;
pub use options::{AdapterProduct, CheckpointOptions};
#[cfg(feature = "pytorch")]
pub(crate) use series::{CheckpointSeries, SeriesTensor, is_pytorch_file, list_checkpoints, open_series};
pub(crate) use wrappers::unwrapped;

/// Checkpoints of one model, in order of their steps.
#[derive(Debug)]
pub(crate) struct OpenedCheckpoints {
    pub models: Vec<CheckpointModel>,
    pub steps: Vec<u64>,
    /// Notes on how they were read.
    pub notes: Vec<String>,
    /// Adapters whose products are averaged.
    pub adapters: Option<Adapters>,
}

/// Opens checkpoints and checks that they are of one model.
///
/// # Errors
/// As [`Checkpoints::open_with`](crate::Checkpoints::open_with).
pub(crate) fn open_all<P: AsRef<Path>>(paths: &[P], options: &CheckpointOptions) -> Result<OpenedCheckpoints> {
    let opened = open_found(find::find(paths)?, options)?;
    match opened.models.as_slice() {
        [only] => {
            let why = format!("this is the only checkpoint ({}): name at least two", opened.notes.join("; "));
            Err(Error::unexpected(&only.found.path, why))
        }
        _ => Ok(opened),
    }
}

/// Opens the checkpoints that were found.
fn open_found(found: Vec<FoundCheckpoint>, options: &CheckpointOptions) -> Result<OpenedCheckpoints> {
    start_threads()?;
    let read = ReadOptions::new(options)?;
    // Collected before errors are looked for, so that the first one does not depend on the threads.
    let opened: Vec<Result<CheckpointModel>> =
        found.into_par_iter().map(|found| CheckpointModel::open(found, &read)).collect();
    let models: Vec<CheckpointModel> = opened.into_iter().collect::<Result<_>>()?;
    models.iter().try_for_each(quantized::check)?;
    let mut stepped = steps::steps(models, options.steps.as_deref())?;
    stepped.models.sort_by_key(|(step, _)| *step);
    let (steps, mut models): (Vec<u64>, Vec<CheckpointModel>) = stepped.models.into_iter().unzip();
    for patterns in [&read.copy, &read.leave_out] {
        let entries = models[0].tensors.keys().map(String::as_str);
        let others = models[0].left_out.iter().chain(&options.other_names).map(String::as_str);
        patterns.check(entries.chain(others))?;
    }
    let mut notes = notes::of_models(&models);
    notes.extend(stepped.notes);
    notes.extend(wrappers::look_through(&mut models));
    for model in &models[1..] {
        model.check_sibling(&models[0], &read)?;
    }
    models[0].check_averaged()?;
    let adapters = match options.product {
        AdapterProduct::Factors => None,
        AdapterProduct::Svd => Some(Adapters::find(&models)?),
    };
    Ok(OpenedCheckpoints { models, steps, notes, adapters })
}

/// Opens the folder of a model, as `save_pretrained` writes it. Tensors that `leave_out` matches are not of interest.
///
/// # Errors
/// [`Error::Unexpected`] for anything else, [`Error::Setting`] for a pattern that is not a glob, and as
/// [`CheckpointModel::open`].
pub(crate) fn open_folder(dir: &Path, leave_out: &[String]) -> Result<CheckpointModel> {
    let options = CheckpointOptions { leave_out: leave_out.to_vec(), ..Default::default() };
    let found = find::find_one(dir)?;
    if !dir.is_dir() || found.folder.is_none() {
        let why = "not a folder of a model as `save_pretrained` writes it: name one with config.json and weights";
        return Err(Error::unexpected(dir, why));
    }
    let model = CheckpointModel::open(found, &ReadOptions::new(&options)?)?;
    quantized::check(&model)?;
    Ok(model)
}
