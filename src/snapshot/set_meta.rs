//! Metadata of a snapshot, merged from those of its files.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use super::id::SnapshotId;
use super::meta::{Meta, OF_SNAPSHOT};
use super::read::StoredFile;
use super::tensor_set::TensorSet;
use crate::error::{Difference, Error, Result};

/// Merges the metadata of a snapshot's files. `sibling` are the files and the metadata of a snapshot with the same
/// tensors.
///
/// # Errors
/// Those of [`Meta::from_strings`]; [`Error::Unexpected`] for another step than that of the name; [`Error::Mismatch`]
/// if the files do not belong together.
pub(super) fn read_meta(id: SnapshotId, set: &TensorSet, sibling: Option<(&TensorSet, &Meta)>) -> Result<Meta> {
    let Some((first, others)) = set.files().split_first() else {
        return Err(Error::NoSource { wanted: format!("file of snapshot {id}"), remedy: "name its files" });
    };
    // Only the metadata of a snapshot in one file equal the strings of that file: shards hold parts of them.
    let whole = sibling.filter(|_| others.is_empty());
    let known = whole.map(|(set, meta)| (set.files()[0].metadata(), meta));
    let mut meta = Meta::from_strings_like(first.path(), first.metadata(), known)?;
    check_step(first, id, &meta)?;
    if let Some((_, sibling)) = sibling.filter(|_| set.has_parts())
        && others.iter().all(|file| has_strings_of(file, first))
    {
        // Tensors are shared only if the strings that concern them are equal in each file.
        meta.dtypes = sibling.dtypes.clone();
        meta.copied = sibling.copied.clone();
        meta.tied = sibling.tied.clone();
        return Ok(meta);
    }
    let mut all = vec![meta.clone()];
    for file in others {
        let own = Meta::from_strings(file.path(), file.metadata())?;
        check_step(file, id, &own)?;
        merge(&mut meta, &own, file.path(), first.path())?;
        all.push(own);
    }
    let mut models = BTreeMap::new();
    set.files().iter().zip(&all).try_for_each(|(file, own)| check_tensors(file, own, &mut models))?;
    Ok(meta)
}

/// Returns true if the metadata of two files of a snapshot agree in all that does not concern their tensors.
fn has_strings_of(file: &StoredFile, other: &StoredFile) -> bool {
    OF_SNAPSHOT.iter().all(|key| file.metadata().get(*key) == other.metadata().get(*key))
}

/// Checks that a file holds the step that its name claims.
fn check_step(file: &StoredFile, id: SnapshotId, meta: &Meta) -> Result<()> {
    if meta.step == id.step {
        return Ok(());
    }
    let why = format!("the name says step {}, but the file holds step {}: restore its name", id.step, meta.step);
    Err(Error::unexpected(file.path(), why))
}

/// Adds the metadata of another file of the same snapshot.
fn merge(meta: &mut Meta, own: &Meta, path: &Path, other: &Path) -> Result<()> {
    let session = |meta: &Meta| meta.session.as_ref().map(ToString::to_string);
    let extensions = |meta: &Meta| serde_json::json!(meta.extensions).to_string();
    for (what, found, expected) in [
        ("the profile", Some(&own.profile), Some(&meta.profile)),
        ("the history", own.history.as_ref(), meta.history.as_ref()),
        ("the run's id", own.run.as_ref(), meta.run.as_ref()),
        ("the writing session", session(own).as_ref(), session(meta).as_ref()),
        ("the list of extensions", Some(&extensions(own)), Some(&extensions(meta))),
    ] {
        if found != expected {
            let shown = |text: Option<&String>| text.cloned().unwrap_or_else(|| "none".into());
            return Err(Error::mismatch(path, other, Difference::new(what, shown(expected), shown(found))));
        }
    }
    meta.dtypes.extend(own.dtypes.iter().map(|(name, &dtype)| (name.clone(), dtype)));
    meta.copied.extend(own.copied.iter().cloned());
    for (dropped, kept) in &own.tied {
        let known = meta.tied.insert(dropped.clone(), kept.clone());
        if let Some(known) = known.filter(|known| known != kept) {
            let what = format!("the tensor that `{dropped}` is tied to");
            return Err(Error::mismatch(path, other, Difference::new(what, known, kept)));
        }
    }
    Ok(())
}

/// Dtype of a tensor in the model, true if it is copied, and a file that says so.
type ModelOf<'a> = (Dtype, bool, &'a Path);

/// Checks that the parts of a tensor in different files have the same dtype of the model, and are all averaged or none.
fn check_tensors<'a>(file: &'a StoredFile, own: &Meta, models: &mut BTreeMap<&'a str, ModelOf<'a>>) -> Result<()> {
    for (name, stored) in file.tensors().iter() {
        let dtype = own.dtypes.get(name).copied().unwrap_or(stored.dtype);
        let is_copied = own.copied.contains(name);
        let &mut (expected, expected_copied, other) = models.entry(name).or_insert((dtype, is_copied, file.path()));
        if expected != dtype {
            let what = format!("the dtype of tensor `{name}` in the model");
            return Err(Error::mismatch(file.path(), other, Difference::new(what, expected, dtype)));
        }
        if expected_copied != is_copied {
            let word = |copied: bool| if copied { "copied" } else { "averaged" };
            let what = format!("the treatment of tensor `{name}`");
            let difference = Difference::new(what, word(expected_copied), word(is_copied));
            return Err(Error::mismatch(file.path(), other, difference));
        }
    }
    Ok(())
}
