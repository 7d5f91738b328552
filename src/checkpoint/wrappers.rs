//! Prefixes that wrappers of a model put before the names of its tensors.

use std::collections::{BTreeMap, BTreeSet};

use super::model::CheckpointModel;
use crate::error::shown;

/// Parts of names that wrappers add: DataParallel, `torch.compile`, FSDP, and accelerate's and Lightning's own.
const WRAPPERS: [&str; 4] = ["module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module"];

/// Renames tensors to the names without wrappers if that is what the checkpoints differ in. Returns a note of it.
pub(super) fn look_through(models: &mut [CheckpointModel]) -> Option<String> {
    let names = |model: &CheckpointModel| model.tensors.keys().cloned().collect::<BTreeSet<String>>();
    let plain = |model: &CheckpointModel| {
        let plain: BTreeSet<String> = model.tensors.keys().map(|name| unwrapped(name)).collect();
        (plain.len() == model.tensors.len()).then_some(plain)
    };
    let (first, rest) = models.split_first()?;
    let differs = rest.iter().any(|model| names(model) != names(first));
    let first_plain = plain(first)?;
    if !differs || rest.iter().any(|model| plain(model).as_ref() != Some(&first_plain)) {
        return None;
    }
    let wrapped = models.iter().find(|model| names(model) != first_plain)?;
    let example = wrapped.tensors.keys().find(|name| unwrapped(name) != **name)?;
    let note = format!(
        "{} names its tensors as a wrapper of the model does, as in `{example}`; they are averaged as `{}`",
        shown(&wrapped.found.path),
        unwrapped(example)
    );
    for model in models {
        let tensors = std::mem::take(&mut model.tensors);
        model.tensors = tensors.into_iter().map(|(name, entry)| (unwrapped(&name), entry)).collect::<BTreeMap<_, _>>();
    }
    Some(note)
}

/// Returns a name without the parts that wrappers add. Only DataParallel's is an ordinary word: it counts in front.
pub(crate) fn unwrapped(name: &str) -> String {
    let mut parts: Vec<&str> = name.split('.').collect();
    parts.retain(|part| *part == WRAPPERS[0] || !WRAPPERS.contains(part));
    let is_wrapped = parts.len() > 1 && parts[0] == WRAPPERS[0];
    parts[usize::from(is_wrapped)..].join(".")
}
