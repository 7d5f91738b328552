//! Files of PyTorch, tensor by tensor into files that can be mapped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::find::Input;
use super::model::{Model, Part};
use crate::error::{Error, Result};
use crate::snapshot::FileLayout;

use crate::fs::write_all_at;

use crate::pytorch::Checkpoint;

/// Converts those files of a checkpoint that cannot be mapped, into the new folder `dir`.
///
/// # Errors
/// [`Error::Io`], [`Error::Damaged`] for elements that are not in the file.
pub(super) fn convert(model: &Model, dir: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<Model> {
    fs::create_dir(dir).map_err(Error::io("create", dir))?;
    let one = |(i, (part, path)): (usize, (&Part, &PathBuf))| match part {
        Part::Mapped(_) => Ok(path.clone()),
        Part::Torch(_) => {
            let to = dir.join(format!("{i}.safetensors"));
            write(&to, &Checkpoint::open_model(path)?, progress)?;
            Ok(to)
        }
    };
    let parts = model.parts.iter().zip(&model.input.parts).enumerate().map(one).collect::<Result<_>>()?;
    // The index names the files as they were.
    Model::open(Input { parts, index: None, ..model.input.clone() })
}

/// Nothing is synced: the file is read at once and then removed.
fn write(path: &Path, file: &Checkpoint, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
    let layout = FileLayout::new(file.names().map(|name| file.spec(name)).collect::<Result<_>>()?)?;
    let header = layout.header(&Default::default())?;
    let out = File::create_new(path).map_err(Error::io("create", path))?;
    let put = |bytes: &[u8], at: usize| write_all_at(&out, at as u64, bytes).map_err(Error::io("write", path));
    put(&header, 0)?;
    for place in layout.places() {
        let bytes = file.read(&layout.specs()[place.index].name)?;
        put(&bytes, header.len() + place.range.start)?;
        progress(bytes.len() as u64);
    }
    Ok(())
}
