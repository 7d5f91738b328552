//! Steps of averages: those of the files, as long as they are not epochs.

use std::path::{Path, PathBuf};

use crate::checkpoint::is_pytorch_file;
use crate::error::{Error, Result};
use crate::pytorch::Checkpoint;

/// Keys of a step in training checkpoints.
const STEP_KEYS: [&str; 3] = ["step", "global_step", "steps"];

/// Reads the same number from every file; `None` if one lacks it.
///
/// # Errors
/// As [`Checkpoint::open_values`].
pub(super) fn numbers(paths: &[PathBuf], keys: &[&str]) -> Result<Option<Vec<u64>>> {
    let mut numbers = Vec::with_capacity(paths.len());
    for path in paths {
        let Some(number) = Checkpoint::open_values(path)?.int(keys).and_then(|number| number.try_into().ok()) else {
            return Ok(None);
        };
        numbers.push(number);
    }
    Ok(Some(numbers))
}

/// Checks that the steps which were read from names are not the numbers of epochs. A decay is one of a step.
///
/// # Errors
/// [`Error::Unexpected`] with the remedy.
pub(super) fn check_no_epochs<'a>(files: impl Iterator<Item = (&'a Path, u64)>) -> Result<()> {
    let mut first = None;
    for (path, step) in files {
        if !is_epoch(path, step)? {
            return Ok(());
        }
        first = first.or(Some((path, step)));
    }
    let Some((path, step)) = first else { return Ok(()) };
    let why = format!(
        "{step} is the number of an epoch, and averages are updated by the step: give the steps of all, in the order \
         of their names, with --steps 1251,2502,... (`steps`)"
    );
    Err(Error::unexpected(path, why))
}

fn is_epoch(path: &Path, step: u64) -> Result<bool> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    if name.contains("epoch") && !name.contains("step") && !name.contains("iter") && name.contains(&step.to_string()) {
        return Ok(true);
    }
    if !is_pytorch_file(path) {
        return Ok(false);
    }
    let values = Checkpoint::open_values(path)?;
    if STEP_KEYS.iter().any(|key| values.int(&[key]).is_some()) {
        return Ok(false);
    }
    let epoch = values.int(&["epoch"]).and_then(|epoch| u64::try_from(epoch).ok());
    Ok(epoch.is_some_and(|epoch| epoch == step || epoch.saturating_add(1) == step))
}
