//! Checkpoints of DeepSpeed, of the stages 0 to 3 of ZeRO.
//!
//! Up to stage 2, one file has the whole module, and the optimizer's f32 weights are cut among the processes: the
//! parameters of a group follow each other in one list, and each process has a stretch of it. In stage 3 each process
//! has a stretch of every parameter, and its stretches follow each other in its own list.

mod assembly;
mod files;
mod flat_list;
mod module_state;
mod optimizer_state;

use std::path::Path;

use assembly::Assembly;
use files::CheckpointFiles;
use module_state::ModuleState;

use super::tensor_file::TensorFile;
use crate::error::{Error, Result};
use crate::tensor::NamePatterns;

/// Keys that choose the weights: those of the module, or the optimizer's in f32.
const MODULE: &str = "module";
const MASTERS: &str = "fp32";

/// Weights of a model in the folder of a checkpoint.
#[derive(Debug)]
pub struct DeepSpeedModel {
    /// Tensors of the model.
    pub tensors: TensorFile,
    /// Names of entries that were left out.
    pub left_out: Vec<String>,
    /// Names of entries that are None.
    pub nones: Vec<String>,
    /// Note on which weights were taken.
    pub note: Option<&'static str>,
    /// Number of steps of the optimizer.
    pub step: Option<u64>,
}

impl DeepSpeedModel {
    /// Opens the weights of a model. `key` is `module` for the module's own, `fp32` for the optimizer's. By default
    /// they are the optimizer's if the folder has its files.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] for files that are missing or do not fit; [`Error::Unexpected`] for another
    /// key, for a model in parts whose layout only its training knows, and for entries that are not tensors.
    pub(crate) fn open(folder: &Path, key: Option<&str>, leave_out: &NamePatterns) -> Result<DeepSpeedModel> {
        let files = CheckpointFiles::find(folder)?;
        let with_masters = wants_masters(folder, &files, key)?;
        let first = files.module.as_ref().or(files.module_parts.get(&0)).ok_or_else(|| {
            Error::damaged(folder, "the module's state of process 0 is missing: the checkpoint is incomplete")
        })?;
        let module = ModuleState::open(first)?;
        let step = module.int("global_steps").and_then(|step| step.try_into().ok());
        let note = note(&files, &module, key, with_masters);
        let mut assembly = Assembly::default();
        if with_masters {
            assembly.add_optimizer(folder, &files, &module)?;
        }
        assembly.add_module(module, files.is_in_parts(), leave_out)?;
        let nones = std::mem::take(&mut assembly.nones);
        let (tensors, left_out) = assembly.finish(folder, leave_out)?;
        Ok(DeepSpeedModel { tensors, left_out, nones, note, step })
    }
}

/// Returns true if the weights are the optimizer's.
fn wants_masters(folder: &Path, files: &CheckpointFiles, key: Option<&str>) -> Result<bool> {
    match key {
        None => Ok(files.is_in_parts() || !files.optimizer.is_empty()),
        Some(MASTERS) => Ok(true),
        Some(MODULE) if files.is_in_parts() => {
            let why =
                format!("stage 3 of ZeRO stores no whole weights of the module: --key (`key`) may be `{MASTERS}`");
            Err(Error::unexpected(folder, why))
        }
        Some(MODULE) => Ok(false),
        Some(other) => {
            let why = format!("it has no entry `{other}`: --key (`key`) may be `{MODULE}` or `{MASTERS}`");
            Err(Error::unexpected(folder, why))
        }
    }
}

/// Names the weights that were taken if there could be others.
fn note(files: &CheckpointFiles, module: &ModuleState, key: Option<&str>, with_masters: bool) -> Option<&'static str> {
    match (with_masters, key) {
        (true, _) if files.is_in_parts() => Some("the f32 weights of DeepSpeed's optimizer are averaged"),
        (true, _) => {
            Some("the f32 weights of DeepSpeed's optimizer are averaged; --key module (`key`) chooses the module's own")
        }
        (false, None) if !module.groups.is_empty() => Some(
            "the module's own weights are averaged: the folder lacks the files of DeepSpeed's optimizer, which has \
             them in f32",
        ),
        (false, _) => None,
    }
}
