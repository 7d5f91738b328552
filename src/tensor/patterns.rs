//! Choice of tensors by name or glob.

use std::collections::BTreeSet;

use globset::{Glob, GlobSet, GlobSetBuilder};

use crate::error::{Error, Result};

/// Set of names. A pattern also matches the tensor of exactly that name: `layers[0].weight` is a name and a glob.
#[derive(Debug, Default)]
pub(crate) struct NamePatterns {
    option: &'static str,
    literal: BTreeSet<String>,
    globs: GlobSet,
}

impl NamePatterns {
    /// Compiles the patterns of an option.
    ///
    /// # Errors
    /// [`Error::Setting`] for a pattern that is not a glob.
    pub(crate) fn new(option: &'static str, patterns: &[String]) -> Result<NamePatterns> {
        let setting = |error: globset::Error| Error::Setting { option, reason: error.to_string() };
        let mut globs = GlobSetBuilder::new();
        for pattern in patterns {
            globs.add(Glob::new(pattern).map_err(setting)?);
        }
        Ok(NamePatterns { option, literal: patterns.iter().cloned().collect(), globs: globs.build().map_err(setting)? })
    }

    /// Returns true for a set without patterns.
    pub(crate) fn is_empty(&self) -> bool {
        self.literal.is_empty()
    }

    /// Returns true if a pattern matches the name.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.literal.contains(name) || self.globs.is_match(name)
    }

    /// Checks that every pattern matches a tensor: a typo would otherwise average the wrong tensors.
    ///
    /// # Errors
    /// [`Error::Setting`] for one that does not.
    pub(crate) fn check<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        for pattern in &self.literal {
            let glob = Glob::new(pattern).map(|glob| glob.compile_matcher());
            let matches = |name: &str| name == pattern || glob.as_ref().is_ok_and(|glob| glob.is_match(name));
            if !names.clone().any(matches) {
                let reason = format!("`{pattern}` matches no tensor of the model: check its spelling");
                return Err(Error::Setting { option: self.option, reason });
            }
        }
        Ok(())
    }
}
