//! Choice of tensors by name or glob.

use std::collections::BTreeSet;

use globset::{Glob, GlobSet, GlobSetBuilder};

use crate::error::{Error, Result};
use crate::run::Settings;
use crate::tensor::TensorView;

/// Tensors to average, to copy and to leave out, as the user named them.
#[derive(Debug, Default)]
pub(super) struct TensorChoice {
    /// If given, only these are averaged, and other floating-point tensors are copied.
    pub average: Option<NamePatterns>,
    pub copy: NamePatterns,
    pub leave_out: NamePatterns,
}

/// Set of names. A pattern also matches the tensor of exactly that name: `layers[0].weight` is a name and a glob.
#[derive(Debug, Default)]
pub(super) struct NamePatterns {
    option: &'static str,
    literal: BTreeSet<String>,
    globs: GlobSet,
}

impl NamePatterns {
    /// Compiles the patterns of an option.
    ///
    /// # Errors
    /// [`Error::Setting`] for a pattern that is not a glob.
    fn new(option: &'static str, patterns: &[String]) -> Result<NamePatterns> {
        let setting = |error: globset::Error| Error::Setting { option, reason: error.to_string() };
        let mut globs = GlobSetBuilder::new();
        for pattern in patterns {
            globs.add(Glob::new(pattern).map_err(setting)?);
        }
        Ok(NamePatterns { option, literal: patterns.iter().cloned().collect(), globs: globs.build().map_err(setting)? })
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.literal.contains(name) || self.globs.is_match(name)
    }

    /// Checks that every pattern matches a tensor: a typo would otherwise average the wrong tensors.
    fn check(&self, views: &[TensorView<'_>]) -> Result<()> {
        for pattern in &self.literal {
            let glob = Glob::new(pattern).map(|glob| glob.compile_matcher());
            let matches = |name: &str| name == pattern || glob.as_ref().is_ok_and(|glob| glob.is_match(name));
            if !views.iter().any(|view| matches(view.name)) {
                let reason = format!("`{pattern}` matches no tensor of the model: check its spelling");
                return Err(Error::Setting { option: self.option, reason });
            }
        }
        Ok(())
    }
}

impl TensorChoice {
    /// Compiles the patterns of a run's settings.
    ///
    /// # Errors
    /// [`Error::Setting`] for a pattern that is not a glob.
    pub(super) fn new(settings: &Settings) -> Result<TensorChoice> {
        Ok(TensorChoice {
            average: settings.average.as_ref().map(|patterns| NamePatterns::new("average", patterns)).transpose()?,
            copy: NamePatterns::new("copy", &settings.copy)?,
            leave_out: NamePatterns::new("leave_out", &settings.leave_out)?,
        })
    }

    /// Checks that every pattern matches a tensor.
    ///
    /// # Errors
    /// [`Error::Setting`] for one that does not.
    pub(super) fn check(&self, views: &[TensorView<'_>]) -> Result<()> {
        self.average.iter().chain([&self.copy, &self.leave_out]).try_for_each(|patterns| patterns.check(views))
    }
}
