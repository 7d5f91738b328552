//! Tensors that a PyTorch file does not hold in C order, gathered in a file that can be mapped.

use std::fs::File;
use std::path::Path;

use crate::checkpoint::{CheckpointModel, WeightFile};
use crate::error::{Error, Result};
use crate::fs::write_all_at;
use crate::snapshot::{FileLayout, StoredFile};

/// Writes the tensors of a checkpoint that are not in C order to the new file `path`, one by one, and maps it.
///
/// The file is not synced: it is read at once and then removed.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn gather(model: &CheckpointModel, path: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<StoredFile> {
    let layout = FileLayout::new(model.scattered().map(|(name, entry)| entry.spec(name)).collect())?;
    let header = layout.header(&Default::default())?;
    let file = File::create_new(path).map_err(Error::io("create", path))?;
    write_all_at(&file, 0, &header).map_err(Error::io("write", path))?;
    for place in layout.places() {
        let entry = &model.tensors[&layout.specs()[place.index].name];
        if let WeightFile::Torch(weights) = &model.files[entry.file] {
            let bytes = weights.tensors.read(&entry.stored_name)?;
            let start = header.len() + place.range.start;
            write_all_at(&file, start as u64, &bytes).map_err(Error::io("write", path))?;
            progress(bytes.len() as u64);
        }
    }
    StoredFile::open(path)
}
