//! Conversion of PyTorch files, tensor by tensor, into files that can be mapped.

use std::fs::{self, File};
use std::path::Path;

use super::find::FoundCheckpoint;
use super::model::CheckpointModel;
use super::weight_file::WeightFile;
use crate::error::{Error, Result};
use crate::fs::write_all_at;
use crate::pytorch::Checkpoint;
use crate::snapshot::FileLayout;

/// Converts the files of a checkpoint that cannot be mapped, into the new folder `dir`, and opens the checkpoint again.
///
/// # Errors
/// [`Error::Io`], and [`Error::Damaged`] for elements that are not in the file.
pub(super) fn convert(model: &CheckpointModel, dir: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<CheckpointModel> {
    fs::create_dir(dir).map_err(Error::io("create", dir))?;
    let mut files = Vec::with_capacity(model.files.len());
    for (i, (file, path)) in model.files.iter().zip(&model.found.files).enumerate() {
        files.push(match file {
            WeightFile::Mapped(_) => path.clone(),
            WeightFile::Torch(_) => {
                let converted = dir.join(format!("{i}.safetensors"));
                write(&converted, &Checkpoint::open_model(path)?, progress)?;
                converted
            }
        });
    }
    // The index names the files by their old names.
    CheckpointModel::open(FoundCheckpoint { files, index: None, ..model.found.clone() })
}

/// Writes a safetensors file without syncing it: it is read at once and then removed.
fn write(path: &Path, checkpoint: &Checkpoint, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
    let layout = FileLayout::new(checkpoint.names().map(|name| checkpoint.spec(name)).collect::<Result<_>>()?)?;
    let header = layout.header(&Default::default())?;
    let file = File::create_new(path).map_err(Error::io("create", path))?;
    write_all_at(&file, 0, &header).map_err(Error::io("write", path))?;
    for place in layout.places() {
        let bytes = checkpoint.read(&layout.specs()[place.index].name)?;
        let start = header.len() + place.range.start;
        write_all_at(&file, start as u64, &bytes).map_err(Error::io("write", path))?;
        progress(bytes.len() as u64);
    }
    Ok(())
}
