//! Places of outputs: outside of all inputs.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result, shown};

/// Checks that an output is neither an input folder nor in one.
///
/// # Errors
/// [`Error::Unexpected`], and [`Error::Io`].
pub(crate) fn check_inputs<'p>(path: &Path, folders: impl Iterator<Item = &'p PathBuf>) -> Result<()> {
    let place = resolve(path)?;
    for folder in folders {
        if resolve(folder).is_ok_and(|dir| place.starts_with(dir)) {
            let why = format!(
                "this is inside {}, which is left untouched: write elsewhere, such as beside that folder",
                shown(folder)
            );
            return Err(Error::unexpected(path, why));
        }
    }
    Ok(())
}

/// Returns the absolute path, with links and `..` resolved.
///
/// Components that do not exist yet will be plain directories.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn resolve(path: &Path) -> Result<PathBuf> {
    let mut place = PathBuf::new();
    for component in std::path::absolute(path).map_err(Error::io("find", path))?.components() {
        match component {
            Component::ParentDir => {
                place.pop();
            }
            component => place.push(component),
        }
        place = place.canonicalize().unwrap_or(place);
    }
    Ok(place)
}
