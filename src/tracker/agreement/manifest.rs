//! Manifest of one process: its tensors, options and run.

use std::collections::{BTreeMap, HashSet};
use std::path;

use serde::{Deserialize, Serialize};

use super::fingerprint::Fingerprints;
use super::parse;
use crate::error::{Error, Result};
use crate::run::{LiveState, Settings, StateDocument, newest_state};
use crate::tensor::{Dtype, Parameters, TensorView, byte_size};
use crate::tracker::Options;
use crate::tracker::registry::ties_of;
use crate::tracker::tensor_choice::TensorChoice;

/// Description of the tensors, options and run of one process, for [`agree`](crate::agree).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShardManifest {
    /// Number of the process among all, which messages name.
    pub process: usize,
    /// Options that must be equal on all processes, as text.
    pub(super) options: BTreeMap<String, String>,
    /// Settings, of which the patterns of names are used.
    pub(super) settings: Settings,
    /// Tensors of the model, left out ones too.
    pub(super) tensors: Vec<ManifestTensor>,
    /// Tied tensors that are not empty.
    pub(super) ties: BTreeMap<String, String>,
}

/// Tensor of a manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ManifestTensor {
    pub name: String,
    pub dtype: Dtype,
    pub global: Vec<usize>,
    pub offset: Vec<usize>,
    pub shape: Vec<usize>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_buffer: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_replica: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_left_out: bool,
    /// Hash of the first values; none for a tensor that no other process can have the same of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(flag: &bool) -> bool {
    !flag
}

impl ManifestTensor {
    pub(super) fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }
}

impl ShardManifest {
    /// Returns the manifest as JSON, for the process that compares all.
    pub fn to_json(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// Reads a manifest from JSON.
    ///
    /// # Errors
    /// [`Error::Setting`] for other text.
    pub fn from_json(text: &str) -> Result<ShardManifest> {
        parse("manifest", text)
    }
}

impl Options {
    /// Describes what this process would track, for [`agree`](crate::agree). `process` is its number among all.
    ///
    /// Reads the first 4 KiB of each tensor, and writes nothing.
    ///
    /// # Errors
    /// Those of [`Options::create`] for an invalid option or tensor.
    pub fn manifest(&self, process: usize, params: &(impl Parameters + ?Sized)) -> Result<ShardManifest> {
        let settings = self.settings(Settings::default())?;
        settings.check()?;
        let choice = TensorChoice::new(&settings)?;
        let options = self.shared_options(&settings)?;
        let mut manifest = ShardManifest { process, options, settings, tensors: Vec::new(), ties: BTreeMap::new() };
        params.with_tensors(&mut |views| {
            manifest.ties = ties_of(views, &choice, |_| true);
            let mut names = HashSet::new();
            let mut fingerprints = Fingerprints::default();
            manifest.tensors = Vec::with_capacity(views.len());
            for view in views {
                if !names.insert(view.name) {
                    return Err(Error::tensor(view.name, "the name occurs twice: names must be unique"));
                }
                manifest.tensors.push(describe(view, &choice, &mut fingerprints)?);
            }
            Ok(())
        })?;
        Ok(manifest)
    }

    /// Returns the options that must be equal on all processes.
    fn shared_options(&self, settings: &Settings) -> Result<BTreeMap<String, String>> {
        let mut options = BTreeMap::new();
        if let serde_json::Value::Object(settings) = serde_json::json!(settings) {
            options.extend(settings.into_iter().map(|(name, value)| (name, value.to_string())));
        }
        let dir = path::absolute(&self.dir).map_err(Error::io("find", &self.dir))?;
        options.insert("directory".into(), dir.display().to_string());
        options.insert("on_non_finite".into(), format!("{:?}", self.on_non_finite));
        options.insert("extend".into(), self.extend.to_string());
        options.extend(self.run_on_disk()?);
        Ok(options)
    }

    /// Returns the run in the directory, and the step that a resume goes on from.
    fn run_on_disk(&self) -> Result<Option<(String, String)>> {
        let Some(files) = newest_state(&self.dir)? else { return Ok(None) };
        let StateDocument { run, clock, .. } = LiveState::first_document(&files)?;
        Ok(Some(("resume (the run in the directory)".into(), format!("{run} at step {clock}"))))
    }
}

fn describe(view: &TensorView<'_>, choice: &TensorChoice, fingerprints: &mut Fingerprints) -> Result<ManifestTensor> {
    let TensorView { name, dtype, shape, is_buffer, is_replica, .. } = *view;
    view.part.map_or(Ok(()), |part| part.check(name, shape))?;
    if view.byte_len() != byte_size(name, dtype, shape)? {
        return Err(Error::tensor(name, format!("{} bytes were lent for shape {shape:?} of {dtype}", view.byte_len())));
    }
    let (global, offset) = view.placed();
    let is_left_out = choice.leave_out.contains(name);
    let is_compared = !is_buffer && !is_left_out && view.byte_len() > 0;
    let fingerprint = if is_compared { Some(fingerprints.of(view)?) } else { None };
    Ok(ManifestTensor {
        name: name.to_owned(),
        dtype,
        global,
        offset,
        shape: shape.to_vec(),
        is_buffer,
        is_replica,
        is_left_out,
        fingerprint,
    })
}
