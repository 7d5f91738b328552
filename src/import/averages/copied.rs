//! Tensors that a training copied into its averages, such as buffers: alike in all entries of each checkpoint.

use std::collections::BTreeSet;

use crate::checkpoint::OpenedCheckpoints;
use crate::error::{Result, listed};

/// Floating-point tensors that are not averages.
#[derive(Debug, Default)]
pub(super) struct CopiedTensors {
    pub names: BTreeSet<String>,
    /// Names that were found by their elements.
    found: BTreeSet<String>,
}

impl CopiedTensors {
    pub(super) fn warning(&self) -> Option<String> {
        let found: Vec<&str> = self.found.iter().map(String::as_str).collect();
        (!found.is_empty()).then(|| {
            format!(
                "alike in the averages and the raw weights of each step, so copied, not averaged: {}",
                listed(&found)
            )
        })
    }
}

/// Finds the copied tensors: those of the options, and those that are alike in all series at each step, but change.
///
/// With one series only, a copy looks like an average.
///
/// # Errors
/// As [`OpenedCheckpoints::elements`].
pub(super) fn find(opened: &[OpenedCheckpoints]) -> Result<CopiedTensors> {
    let Some((first, others)) = opened.split_first() else { return Ok(CopiedTensors::default()) };
    let tensors = first.series_tensors();
    let names = tensors.iter().filter(|tensor| tensor.copied).map(|tensor| tensor.name.to_owned()).collect();
    let mut copied = CopiedTensors { names, found: BTreeSet::new() };
    let averaged: Vec<&str> = tensors.iter().filter(|tensor| tensor.averaged).map(|tensor| tensor.name).collect();
    if others.is_empty() || others.iter().any(|other| other.steps != first.steps) {
        return Ok(copied);
    }
    let newest = first.steps.len() - 1;
    for name in &averaged {
        if is_copied(opened, newest, name)? {
            copied.found.insert((*name).to_owned());
        }
    }
    // If nothing differs, the averages are at their first update.
    if copied.found.len() == averaged.len() {
        copied.found.clear();
    }
    copied.names.extend(copied.found.iter().cloned());
    Ok(copied)
}

/// Returns true if a tensor is alike in all series at each step, and changes. The newest step is compared first.
fn is_copied(opened: &[OpenedCheckpoints], newest: usize, name: &str) -> Result<bool> {
    let (first, others) = (&opened[0], &opened[1..]);
    let mut changes = false;
    let newest_elements = first.elements(newest, name)?;
    for i in (0..=newest).rev() {
        let elements = first.elements(i, name)?;
        for other in others {
            if !other.elements(i, name)?.equals(elements) {
                return Ok(false);
            }
        }
        changes = changes || !elements.equals(newest_elements);
    }
    Ok(changes)
}
