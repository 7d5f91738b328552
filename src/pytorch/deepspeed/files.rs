//! The files of a checkpoint of DeepSpeed, by their names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, listed};

/// Files of the model-parallel rank 0.
#[derive(Debug, Default)]
pub(super) struct CheckpointFiles {
    /// State of the whole module, of the stages 0 to 2.
    pub module: Option<PathBuf>,
    /// State of each process's part of the module, of stage 3.
    pub module_parts: BTreeMap<usize, PathBuf>,
    /// State of each process's part of the optimizer.
    pub optimizer: BTreeMap<usize, PathBuf>,
}

/// Kind of a file, with the ranks that its name has.
#[derive(Debug, PartialEq)]
enum FileKind {
    Module {
        model_rank: usize,
    },
    ModulePart {
        rank: usize,
        model_rank: usize,
    },
    Optimizer {
        rank: usize,
        model_rank: usize,
    },
    /// Layers of a pipeline, or experts: parts of a module that have files of their own.
    Layer,
}

impl CheckpointFiles {
    /// Returns true if the module is in parts, as in stage 3.
    pub(super) fn is_in_parts(&self) -> bool {
        !self.module_parts.is_empty()
    }

    /// Finds the files in a folder.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for a model in parts whose layout only its training knows, and [`Error::Io`].
    pub(super) fn find(folder: &Path) -> Result<CheckpointFiles> {
        let mut files = CheckpointFiles::default();
        for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
            let path = entry.map_err(Error::io("list", folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match kind(&name) {
                Some(FileKind::Module { model_rank: 0 }) => files.module = Some(path),
                Some(FileKind::ModulePart { rank, model_rank: 0 }) => drop(files.module_parts.insert(rank, path)),
                Some(FileKind::Optimizer { rank, model_rank: 0 }) => drop(files.optimizer.insert(rank, path)),
                Some(FileKind::Layer) => {
                    let why = format!(
                        "`{name}` holds layers of a pipeline or experts, whose names only the training knows: save \
                         the whole model there, and average that"
                    );
                    return Err(Error::unexpected(folder, why));
                }
                Some(_) => {
                    let why = format!(
                        "`{name}` is of a second model-parallel rank, and only the training knows how its tensors are \
                         cut: merge the ranks there, and average the whole models"
                    );
                    return Err(Error::unexpected(folder, why));
                }
                None => {}
            }
        }
        Ok(files)
    }
}

/// Returns the files of all ranks from 0 to `count` - 1.
///
/// # Errors
/// [`Error::Damaged`] with those that are missing.
pub(super) fn all_of<'a>(
    folder: &Path,
    files: &'a BTreeMap<usize, PathBuf>,
    count: usize,
    remedy: &str,
) -> Result<Vec<&'a Path>> {
    let known = files.values().next().and_then(|path| path.file_name()).unwrap_or_default().to_string_lossy();
    let (before, after) = known.split_once("pp_rank_").unwrap_or(("zero_", ""));
    let after = after.trim_start_matches(|c: char| c.is_ascii_digit());
    let missing = (0..count).filter(|rank| !files.contains_key(rank)).take(MOST_MISSING);
    let missing: Vec<String> = missing.map(|rank| format!("{before}pp_rank_{rank}{after}")).collect();
    if !missing.is_empty() {
        let why = format!("{} of {count} processes is missing: the checkpoint is incomplete{remedy}", listed(&missing));
        return Err(Error::damaged(folder, why));
    }
    if let Some((rank, path)) = files.iter().find(|(rank, _)| **rank >= count) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let why = format!("`{name}` is of process {rank}, but {count} processes saved: it is of another checkpoint");
        return Err(Error::damaged(folder, why));
    }
    Ok(files.values().map(PathBuf::as_path).collect())
}

/// Most missing files that an error counts.
const MOST_MISSING: usize = 100;

/// Reads the name of a file; `None` if it is of another kind.
fn kind(name: &str) -> Option<FileKind> {
    let number = |text: &str, prefix: &str| text.strip_prefix(prefix)?.parse::<usize>().ok();
    if let Some(stem) = name.strip_suffix("_model_states.pt") {
        if let Some(model_rank) = number(stem, "mp_rank_") {
            return Some(FileKind::Module { model_rank });
        }
        let Some((rank, model_rank)) = stem.split_once("_mp_rank_") else { return Some(FileKind::Layer) };
        return Some(match (number(rank, "zero_pp_rank_"), model_rank.parse().ok()) {
            (Some(rank), Some(model_rank)) => FileKind::ModulePart { rank, model_rank },
            _ => FileKind::Layer,
        });
    }
    if name.ends_with("-model_states.pt") {
        return Some(FileKind::Layer);
    }
    let stem = name.strip_suffix("_optim_states.pt")?;
    let plain = stem.strip_prefix("bf16_").or(stem.strip_prefix("fp16_")).unwrap_or(stem);
    let Some((rank, model_rank)) = plain.split_once("_mp_rank_") else { return Some(FileKind::Layer) };
    match (number(rank, "zero_pp_rank_"), model_rank.parse().ok()) {
        (Some(rank), Some(model_rank)) => Some(FileKind::Optimizer { rank, model_rank }),
        _ => Some(FileKind::Layer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_from_names() {
        for (name, expected) in [
            ("mp_rank_00_model_states.pt", Some(FileKind::Module { model_rank: 0 })),
            ("mp_rank_01_model_states.pt", Some(FileKind::Module { model_rank: 1 })),
            ("zero_pp_rank_12_mp_rank_00_model_states.pt", Some(FileKind::ModulePart { rank: 12, model_rank: 0 })),
            ("zero_pp_rank_3_mp_rank_02_optim_states.pt", Some(FileKind::Optimizer { rank: 3, model_rank: 2 })),
            ("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", Some(FileKind::Optimizer { rank: 3, model_rank: 0 })),
            ("fp16_zero_pp_rank_0_mp_rank_00_optim_states.pt", Some(FileKind::Optimizer { rank: 0, model_rank: 0 })),
            ("layer_01-model_00-model_states.pt", Some(FileKind::Layer)),
            ("layer_0_expert_3_mp_rank_00_model_states.pt", Some(FileKind::Layer)),
            ("expp_rank_0_mp_rank_00_optim_states.pt", Some(FileKind::Layer)),
            ("latest", None),
            ("zero_to_fp32.py", None),
            ("optim_states.pt", None),
        ] {
            assert_eq!(kind(name), expected, "{name}");
        }
    }
}
