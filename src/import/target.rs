//! The directory that an import writes to.

use std::path::Path;

use crate::error::{Error, Result};
use crate::fs::check_vacant;
use crate::snapshot::check_empty;

/// Checks that a run can be written to `target`, before anything is read.
///
/// # Errors
/// [`Error::Unexpected`] if it is the source or holds other files, [`Error::RunExists`] if it holds a run.
pub(super) fn check(source: &Path, target: &Path) -> Result<()> {
    let same = matches!((source.canonicalize(), target.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same {
        let why = "the checkpoints are in this directory, which is left untouched: name another one for the run";
        return Err(Error::unexpected(target, why));
    }
    if !target.exists() {
        return Ok(());
    }
    check_empty(target)?;
    check_vacant(target)
}
