//! Tensors of an average under the names that they are written with.

use std::collections::BTreeMap;

use super::form::OutputForm;
use super::rename::RenameRule;
use crate::error::{Error, Result};
use crate::synthesis::SourceSet;

/// Tensors of an average that are written, under their new names.
pub(super) struct NamedTensors {
    /// Index of each tensor in the set, by its new name.
    pub tensors: BTreeMap<String, usize>,
    /// Name of the kept tensor for each tied one, by new names.
    pub tied: BTreeMap<String, String>,
}

impl NamedTensors {
    /// Renames the tensors of a set by the rules of a form, and leaves out what the form does. The tensors `left_out`
    /// are not in the set any more.
    ///
    /// # Errors
    /// [`Error::Setting`] if two tensors get one name, and for rules and patterns that match nothing.
    pub(super) fn new(set: &SourceSet<'_>, left_out: &[String], form: &OutputForm) -> Result<NamedTensors> {
        let names = || set.tensors.iter().map(|tensor| tensor.name.as_str()).chain(set.tied.keys().map(String::as_str));
        let others = form.left_out().iter().chain(left_out).map(String::as_str);
        form.leave_out.check(names().chain(others))?;
        for (i, rule) in form.rename.iter().enumerate().filter(|(_, rule)| rule.must_match()) {
            let is_changed = |name: &str| {
                let before = renamed(&form.rename[..i], name);
                rule.apply(&before) != before
            };
            if !names().any(is_changed) {
                let reason = format!("`{}` changes no name: check its spelling", rule.text);
                return Err(Error::Setting { option: "rename", reason });
            }
        }
        NamedTensors::with(set, form, &form.rename)
    }

    /// As [`NamedTensors::new`], with other rules, which need not match.
    pub(super) fn with(set: &SourceSet<'_>, form: &OutputForm, rules: &[RenameRule]) -> Result<NamedTensors> {
        let mut named = NamedTensors { tensors: BTreeMap::new(), tied: BTreeMap::new() };
        let mut before: BTreeMap<String, &str> = BTreeMap::new();
        let kept = set.tensors.iter().map(|tensor| tensor.name.as_str());
        for name in kept.chain(set.tied.keys().map(String::as_str)).filter(|name| !form.leave_out.contains(name)) {
            let new = renamed(rules, name);
            if new.is_empty() {
                let reason = format!("`{name}` would have no name at all: keep a part of it");
                return Err(Error::Setting { option: "rename", reason });
            }
            if let Some(other) = before.insert(new.clone(), name) {
                let reason = format!("`{other}` and `{name}` would both be called `{new}`: change the rule");
                return Err(Error::Setting { option: "rename", reason });
            }
        }
        for (i, tensor) in set.tensors.iter().enumerate().filter(|(_, tensor)| !form.leave_out.contains(&tensor.name)) {
            named.tensors.insert(renamed(rules, &tensor.name), i);
        }
        for (dropped, kept) in &set.tied {
            named.tied.insert(renamed(rules, dropped), renamed(rules, kept));
        }
        named.tied.retain(|dropped, kept| before.contains_key(dropped) && named.tensors.contains_key(kept));
        Ok(named)
    }

    /// Returns the index of the tensor of a name, or of the one that is kept for it.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).or_else(|| self.tensors.get(self.tied.get(name)?)).copied()
    }
}

/// Applies rules one after the other.
fn renamed(rules: &[RenameRule], name: &str) -> String {
    rules.iter().fold(name.to_owned(), |name, rule| rule.apply(&name))
}
