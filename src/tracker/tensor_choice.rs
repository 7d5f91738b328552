//! Choice of tensors by name or glob.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::shard_place::Sharding;
use crate::error::{Error, Result};
use crate::run::Settings;
use crate::tensor::{NamePatterns, TensorView, is_averaged};

/// Tensors to average, to copy and to leave out, as the user named them.
#[derive(Debug, Default)]
pub(super) struct TensorChoice {
    /// If one of these is a parameter, only these are averaged. Otherwise they are averaged besides the default.
    pub average: Option<NamePatterns>,
    pub copy: NamePatterns,
    pub leave_out: NamePatterns,
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
        self.check_names(views.iter().map(|view| view.name))
    }

    /// Does the same as [`TensorChoice::check`] for names.
    pub(super) fn check_names<'n>(&self, names: impl Iterator<Item = &'n str> + Clone) -> Result<()> {
        let mut patterns = self.average.iter().chain([&self.copy, &self.leave_out]);
        patterns.try_for_each(|patterns| patterns.check(names.clone()))
    }
}

/// Decision which tensors of a model are averaged.
pub(super) struct Roles<'a> {
    pub choice: &'a TensorChoice,
    /// Role in the run that is resumed; `None` for a tensor that is new.
    was_averaged: &'a dyn Fn(&str) -> Option<bool>,
    /// Names of the parameters: tensors that are not buffers.
    parameters: BTreeSet<&'a str>,
    /// True if the option `average` names parameters, so that no others are averaged.
    only_named: bool,
}

impl<'a> Roles<'a> {
    pub(super) fn new(
        views: &'a [TensorView<'_>],
        choice: &'a TensorChoice,
        was_averaged: &'a dyn Fn(&str) -> Option<bool>,
    ) -> Roles<'a> {
        let parameters: BTreeSet<&str> = views.iter().filter(|view| !view.is_buffer).map(|view| view.name).collect();
        let average = choice.average.as_ref();
        let only_named = average.is_some_and(|patterns| parameters.iter().any(|name| patterns.contains(name)));
        Roles { choice, was_averaged, parameters, only_named }
    }

    /// Does the same for a process of a sharded run, which knows only some of the model's names.
    pub(super) fn of_part(self, sharding: Option<&Sharding>) -> Roles<'a> {
        let only_named = sharding.and_then(|sharding| sharding.only_named).unwrap_or(self.only_named);
        Roles { only_named, ..self }
    }

    /// Returns true for a tensor to average, false for one to copy; `names` are its name and those tied to it.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it cannot be averaged, and the user has not said that it is copied.
    pub(super) fn is_averaged(&self, view: &TensorView<'_>, names: &[&str]) -> Result<bool> {
        if let Some(was_averaged) = (self.was_averaged)(view.name) {
            return Ok(was_averaged && is_averaged(view.dtype));
        }
        let is_named = |patterns: &NamePatterns| names.iter().any(|name| patterns.contains(name));
        if is_named(&self.choice.copy) {
            return Ok(false);
        }
        let is_asked_for = self.choice.average.as_ref().is_some_and(is_named);
        let is_parameter = names.iter().any(|name| self.parameters.contains(name));
        let is_default = !self.only_named && (is_parameter || names.iter().any(|name| is_batch_statistic(name)));
        if is_averaged(view.dtype) {
            return Ok(is_asked_for || is_default);
        }
        if is_asked_for || is_default && !is_copied(view.dtype) {
            // Names of 8-bit floats begin with `F8`, those of shorter ones with `F6` and `F4`.
            let dtype = view.dtype.to_string();
            let is_low = ["F8", "F6", "F4"].iter().any(|start| dtype.starts_with(start));
            let masters = if is_low { "track its master weights in f32 or bf16 instead, or " } else { "" };
            let why = format!("{dtype} cannot be averaged: {masters}name it among those to copy or to leave out");
            return Err(Error::tensor(view.name, why));
        }
        Ok(false)
    }
}

/// Returns true for the name of a batch-norm statistic, whichever module holds it.
fn is_batch_statistic(name: &str) -> bool {
    matches!(name.rsplit('.').next(), Some("running_mean" | "running_var"))
}

/// Returns true for dtypes that are copied by default: integers and booleans.
///
/// For parameters of floating-point numbers of 8 bits and fewer, and of complex ones, the user must decide.
fn is_copied(dtype: Dtype) -> bool {
    use Dtype::{BOOL, I8, I16, I32, I64, U8, U16, U32, U64};
    matches!(dtype, BOOL | U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64)
}
