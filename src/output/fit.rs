//! Match of an average to the tensors of a model's folder, so that it loads strictly.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::Dtype;

use super::form::OutputForm;
use super::named::NamedTensors;
use super::rename::RenameRule;
use crate::checkpoint::{CheckpointModel, name_in_file};
use crate::error::{Error, Result};
use crate::synthesis::{ShardTensor, SourceSet};
use crate::tensor::is_averaged;

/// Tensors of an average, in the files of a model's folder.
pub(super) struct Fit {
    /// Tensors of each file.
    pub files: Vec<Vec<ShardTensor>>,
    pub notes: Vec<String>,
}

/// Returns true if two tensors of the sources, by name, are tied.
pub(crate) type IsTied<'a> = &'a dyn Fn(&str, &str) -> bool;

/// Reasons for which a folder would not load strictly.
#[derive(Default)]
struct Misfits {
    missing: Vec<String>,
    unexpected: Vec<String>,
    different: Vec<String>,
}

/// Matches a set to the tensors of a folder. If the names do not fit, the rules for wrappers and PEFT are tried.
///
/// # Errors
/// [`Error::Unexpected`] with all tensors that are missing, unexpected, or of another shape.
pub(super) fn fit(
    set: &SourceSet<'_>,
    left_out: &[String],
    form: &OutputForm,
    like: &CheckpointModel,
    dtype: Option<Dtype>,
    is_tied: IsTied<'_>,
) -> Result<Fit> {
    let named = NamedTensors::new(set, left_out, form)?;
    let misfits = match match_names(set, &named, like, dtype, is_tied) {
        Ok(fit) => return Ok(fit),
        Err(misfits) => misfits,
    };
    let [wrappers, peft] = RenameRule::presets()?;
    for tried in [vec![&wrappers], vec![&peft], vec![&wrappers, &peft]] {
        let rules: Vec<RenameRule> = form.rename.iter().chain(tried.iter().map(|(rule, _)| rule)).cloned().collect();
        let Ok(named) = NamedTensors::with(set, form, &rules) else { continue };
        if let Ok(mut fit) = match_names(set, &named, like, dtype, is_tied) {
            let names: Vec<&str> = tried.iter().map(|(_, what)| *what).collect();
            fit.notes
                .push(format!("names are those of {}; they are written as the folder has them", names.join(" and ")));
            return Ok(fit);
        }
    }
    Err(misfits.error(like))
}

fn match_names(
    set: &SourceSet<'_>,
    named: &NamedTensors,
    like: &CheckpointModel,
    dtype: Option<Dtype>,
    is_tied: IsTied<'_>,
) -> Result<Fit, Misfits> {
    let mut misfits = Misfits::default();
    let mut files = vec![Vec::new(); like.files.len()];
    let mut used: BTreeMap<usize, &str> = BTreeMap::new();
    for (name, entry) in &like.tensors {
        let shared = || like.tensors.keys().filter(|other| like.share_elements(name, other));
        let found = named.find(name).or_else(|| shared().find_map(|other| named.find(other)));
        let Some(i) = found else {
            misfits.missing.push(name.clone());
            continue;
        };
        let tensor = &set.tensors[i];
        used.insert(i, name);
        if tensor.shape != entry.shape {
            misfits.different.push(format!("`{name}` has shape {:?}, not {:?}", tensor.shape, entry.shape));
        }
        if tensor.dtype != entry.dtype && !(is_averaged(tensor.dtype) && is_averaged(entry.dtype)) {
            misfits.different.push(format!("`{name}` is of {}, not {}", tensor.dtype, entry.dtype));
        }
        let dtype = dtype.filter(|_| tensor.averaged).unwrap_or(entry.dtype);
        files[entry.file].push(ShardTensor { tensor: i, name: name_in_file(name).to_owned(), dtype });
    }
    let mut notes = Vec::new();
    for (name, &i) in named.tensors.iter().filter(|(_, i)| !used.contains_key(i)) {
        let own = &set.tensors[i].name;
        match used.iter().find(|(other, _)| is_tied(own, &set.tensors[**other].name)) {
            Some((_, kept)) => notes.push(format!("`{name}` is left out, since it is tied to `{kept}`")),
            None => misfits.unexpected.push(name.clone()),
        }
    }
    if misfits.is_empty() { Ok(Fit { files, notes }) } else { Err(misfits) }
}

impl Misfits {
    fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.different.is_empty()
    }

    fn error(&self, like: &CheckpointModel) -> Error {
        let quoted = |names: &[String]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let mut parts = Vec::new();
        if !self.missing.is_empty() {
            parts.push(format!("the average has no {}", quoted(&self.missing)));
        }
        if !self.unexpected.is_empty() {
            parts.push(format!("the folder has no {}", quoted(&self.unexpected)));
        }
        if !self.different.is_empty() {
            parts.push(format!("in the average {}", self.different.join(", ")));
        }
        let remedies: BTreeSet<&str> = [
            (!self.missing.is_empty() || !self.unexpected.is_empty())
                .then_some("rename tensors with --rename (`rename`), or leave them out with --leave-out (`leave_out`)"),
            (!self.different.is_empty()).then_some("name a folder of the same model"),
        ]
        .into_iter()
        .flatten()
        .collect();
        let remedies: Vec<&str> = remedies.into_iter().collect();
        let why = format!("an average like it would not load: {}: {}", parts.join("; "), remedies.join("; or "));
        Error::unexpected(&like.found.path, why)
    }
}
