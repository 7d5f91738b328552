//! Links in a checkpoint's folder: where the files that are copied along really are.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Folder of Hugging Face's cache whose subfolders are the revisions of a model, in links.
const REVISIONS: &str = "snapshots";

/// Folder beside it with the files that these links lead to.
const BLOBS: &str = "blobs";

/// Places from which files are copied along with a model.
pub(crate) struct CopySource {
    /// Folder of the checkpoint, without links.
    folder: PathBuf,
    /// Folder of the files of the same model in Hugging Face's cache.
    blobs: Option<PathBuf>,
    /// True if links may lead anywhere.
    follow: bool,
}

impl CopySource {
    /// Finds the places for a checkpoint's folder. If `follow` is true, links may lead anywhere.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder is gone.
    pub(crate) fn new(folder: &Path, follow: bool) -> Result<CopySource> {
        let folder = folder.canonicalize().map_err(Error::io("read", folder))?;
        let revisions = folder.ancestors().skip(1).find(|dir| dir.ends_with(REVISIONS));
        let blobs = revisions.and_then(Path::parent).map(|model| model.join(BLOBS));
        Ok(CopySource { folder, blobs, follow })
    }

    /// Returns the path of a file without links.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if a link leads out of the checkpoint's folder, and [`Error::Io`] if it leads nowhere.
    pub(crate) fn resolve(&self, path: &Path) -> Result<PathBuf> {
        let place = path.canonicalize().map_err(Error::io("read", path))?;
        // `blobs` is compared as it is named, so that it cannot be a link itself.
        let is_blob = self.blobs.as_deref().is_some_and(|blobs| place.parent() == Some(blobs));
        if self.follow || is_blob || place.starts_with(&self.folder) {
            return Ok(place);
        }
        let why = format!(
            "a link leads to {}, outside of the checkpoint's folder, and the average would hold a copy of that file: \
             put the file itself there, or allow such links with `follow_links` (`--follow-links`)",
            place.display()
        );
        Err(Error::unexpected(path, why))
    }
}
