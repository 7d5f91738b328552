//! Search for averages: each layout in turn.

use std::path::Path;

use super::found::FoundSet;
use super::{ImportAverages, diffusers, edm2, files, openai};
use crate::error::Result;

/// Finds the averages in a folder.
///
/// # Errors
/// As [`ImportAverages::open`].
pub(super) fn find(import: &ImportAverages, dir: &Path) -> Result<FoundSet> {
    if let Some(found) = edm2::find(import, dir)? {
        return Ok(found);
    }
    if let Some(found) = openai::find(import, dir)? {
        return Ok(found);
    }
    if let Some(found) = diffusers::find(import, dir)? {
        return Ok(found);
    }
    files::find(import, dir)
}
