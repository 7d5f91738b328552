//! Extension of a run: a resume with a model that has other tensors.
//!
//! The average of a tensor that begins holds the tensor's value at the change, as if it had never had another. From
//! then on it decays like all others.

use std::collections::BTreeSet;
use std::path::Path;

use super::engine::{self, EngineConfig};
use super::registry::{Entry, TensorRegistry};
use super::state;
use super::tensor_choice::TensorChoice;
use crate::compute::cpu::{Averages, UpdateWeights};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::run::{LiveState, Settings};
use crate::snapshot::Extension;
use crate::tensor::{Dtype, Parameters, TensorView, first_non_finite};

/// Averages of each profile, and the copied tensors.
pub(super) type StateValues = (Vec<Averages>, Vec<Vec<u8>>);

/// Returns the change from the tensors of a live state to those of a model.
pub(super) fn change(saved: &LiveState, registry: &TensorRegistry) -> Extension {
    let at = saved.document.history.last().unwrap_or(0);
    let mut extension = Extension { at, ..Extension::default() };
    let mut rest: BTreeSet<String> = saved.document.dtypes.keys().cloned().collect();
    rest.extend(saved.copied().map(str::to_owned));
    for entry in registry.averaged() {
        let shape = saved.averaged_shape(&entry.name);
        let is_known = rest.remove(&entry.name);
        if shape == Some(&entry.global) {
            if saved.document.dtypes.get(&entry.name) != Some(&entry.dtype) {
                extension.retyped.insert(entry.name.clone());
            }
        } else {
            begin(&mut extension, entry, is_known);
        }
    }
    for entry in registry.copied() {
        let is_known = rest.remove(&entry.name);
        if !saved.has_copy(&entry.name, entry.dtype, &entry.global) {
            begin(&mut extension, entry, is_known);
        }
    }
    extension.ended.extend(rest);
    extension
}

/// Adds a tensor that begins. A known one ends first.
fn begin(extension: &mut Extension, entry: &Entry, is_known: bool) {
    extension.begun.insert(entry.name.clone());
    if is_known {
        extension.ended.insert(entry.name.clone());
    }
}

/// Returns the values of a live state for the tensors that go on, and those of the model for the tensors that begin.
///
/// # Errors
/// [`Error::Damaged`](crate::Error::Damaged) for a tensor of the state that cannot be read, and those of an update.
pub(super) fn values(
    saved: &LiveState,
    registry: &TensorRegistry,
    settings: &Settings,
    begun: &BTreeSet<String>,
    params: &(impl Parameters + ?Sized),
) -> Result<StateValues> {
    let (mut averages, mut copies) = state::read_values(saved, registry, settings, begun)?;
    let (first, (first_averages, first_copies)) = first_values(saved.path(), registry, settings, begun, params)?;
    let missing = |entry: &Entry| Error::tensor(&entry.name, "its first value could not be read: give it one role");
    for (i, entry) in registry.averaged().iter().enumerate().filter(|(_, entry)| begun.contains(&entry.name)) {
        let Some(Ok(from)) = first.find(&entry.name) else { return Err(missing(entry)) };
        let from = first.layout().range(from);
        let to = registry.layout().range(i);
        for (own, first) in averages.iter_mut().zip(&first_averages) {
            own.high[to.clone()].copy_from_slice(&first.high[from.clone()]);
            if let (Some(own), Some(first)) = (&mut own.low, &first.low) {
                own[to.clone()].copy_from_slice(&first[from.clone()]);
            }
        }
    }
    for (i, entry) in registry.copied().iter().enumerate().filter(|(_, entry)| begun.contains(&entry.name)) {
        let Some(Err(from)) = first.find(&entry.name) else { return Err(missing(entry)) };
        copies[i].clone_from(&first_copies[from]);
    }
    Ok((averages, copies))
}

/// Checks that the first values of the tensors that begin are finite.
///
/// # Errors
/// [`Error::Tensor`] for NaN or infinity.
pub(super) fn check_finite(
    (averages, _): &StateValues,
    registry: &TensorRegistry,
    begun: &BTreeSet<String>,
) -> Result<()> {
    let Some(Averages { high, .. }) = averages.first() else { return Ok(()) };
    for (i, entry) in registry.averaged().iter().enumerate().filter(|(_, entry)| begun.contains(&entry.name)) {
        let values = bytemuck::cast_slice(&high[registry.layout().range(i)]);
        if let Some((element, value)) = first_non_finite(Dtype::F32, values) {
            let reason = format!(
                "its average would begin with {value} at element {element}: repair the model. If the value is \
                 intended, as in a mask, name the tensor among those to copy"
            );
            return Err(Error::tensor(&entry.name, reason));
        }
    }
    Ok(())
}

/// Returns the averages of the tensors that begin after one update with the model.
///
/// An engine makes them, because it reads parameters on any device. It averages at least one tensor.
fn first_values(
    dir: &Path,
    registry: &TensorRegistry,
    settings: &Settings,
    begun: &BTreeSet<String>,
    params: &(impl Parameters + ?Sized),
) -> Result<(TensorRegistry, StateValues)> {
    let any = registry.averaged().first().map(|entry| entry.name.clone());
    let is_read = |view: &TensorView<'_>| {
        let name = registry.tied().get(view.name).map_or(view.name, String::as_str);
        begun.contains(name) || any.as_deref() == Some(name)
    };
    let choice = TensorChoice::new(settings)?;
    let mut first = TensorRegistry::default();
    let mut values = StateValues::default();
    params.with_tensors(&mut |views| {
        let views: Vec<TensorView<'_>> = views.iter().filter(|view| is_read(view)).copied().collect();
        let is_averaged = |name: &str| registry.find(name).map(|found| found.is_ok());
        first = TensorRegistry::resumed(&views, &choice, registry.tied(), &is_averaged, None)?;
        let config = EngineConfig::new(&first, settings);
        let ordered = first.order_views(&views)?;
        let places = engine::places(ordered.all());
        let layout = first.layout();
        let mut engine = engine::start(dir, layout, &places, Device::Cpu, config)?;
        let weights = vec![1.0; settings.profiles.len()];
        engine.fold(&ordered, layout, UpdateWeights::at(0, &weights), false)?;
        engine.flush()?;
        let guard = engine.values()?;
        values = (guard.values().averages.to_vec(), guard.values().copies.to_vec());
        Ok(())
    })?;
    Ok((first, values))
}
