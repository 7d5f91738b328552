//! How each tool lays a checkpoint out: which entries are the model's tensors, and where its own clock is.

use std::collections::BTreeMap;

use super::Tool;
use crate::error::{Error, Result};
use crate::pytorch::{Checkpoint, Number, Value};

/// What the names of a model's tensors begin with, where it is not the whole of them.
const PREFIX: &str = "ema_model.";

const STEP: &str = "step";
const INITTED: &str = "initted";
const EXTRA: &str = "_extra_state";
/// What PyTorch adds to the state dict of a module: the versions of its parts.
const METADATA: &str = "_metadata";

/// Where a checkpoint has its model and its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// The model's names, with `initted` and `step` among them: pytorch-posthoc-ema since 1.0.6.
    Plain,
    /// As `Plain`, with a prefix before everything: pytorch-posthoc-ema up to 1.0.5.
    Prefixed,
    /// A prefix before the model's names, `initted` and `step` without one: ema-pytorch.
    Module,
    /// A prefix before the model's names, `initted` and `step` in a dict: nitrous-ema.
    Extra,
}

/// A checkpoint in the model's own names.
pub(super) struct ParsedCheckpoint {
    pub layout: Layout,
    /// Whether another tool lays its checkpoints out in this way too, and more likely.
    pub doubtful: Option<Tool>,
    /// The name of each tensor in the file, by the model's.
    pub keys: BTreeMap<String, String>,
    /// How far the tool had counted.
    pub counted: Number,
    /// Entries that are no tensors of the model and that nothing here needs.
    pub left_out: Vec<String>,
}

impl ParsedCheckpoint {
    /// # Errors
    /// [`Error::Unexpected`] for a checkpoint of another tool, or of none, and for one from before the first update.
    pub(super) fn new(tool: Tool, checkpoint: &Checkpoint) -> Result<ParsedCheckpoint> {
        let layout = layout(tool, checkpoint)?;
        let (initted, counted) = match layout {
            Layout::Extra => from_dict(checkpoint)?,
            Layout::Prefixed => from_tensors(checkpoint, PREFIX)?,
            Layout::Plain | Layout::Module => from_tensors(checkpoint, "")?,
        };
        if !initted {
            let why = "`initted` says that no average had begun: move the file out of the directory";
            return Err(Error::unexpected(checkpoint.path(), why));
        }
        let known = |key: &&String| *key == METADATA || (layout == Layout::Extra && *key == EXTRA);
        let left_out = checkpoint.values().keys().filter(|key| !known(key)).cloned().collect();
        let keys = keys(checkpoint, layout)?;
        if keys.is_empty() {
            return Err(Error::unexpected(
                checkpoint.path(),
                "it holds no tensor of a model: move it out of the directory",
            ));
        }
        let doubtful =
            (layout == Layout::Plain && found(checkpoint) == Some(Layout::Module)).then_some(Tool::EmaPytorch);
        Ok(ParsedCheckpoint { layout, doubtful, keys, counted, left_out })
    }
}

/// The layout of a file, which must be one of the tool's.
fn layout(tool: Tool, checkpoint: &Checkpoint) -> Result<Layout> {
    let Some(found) = found(checkpoint) else {
        let why = format!("no checkpoint of {tool}: it lacks `{STEP}` and `{INITTED}`; move it out of the directory");
        return Err(Error::unexpected(checkpoint.path(), why));
    };
    let owner = match found {
        // A model may have all it has in a module called `ema_model`.
        Layout::Plain | Layout::Module if tool == Tool::PytorchPosthocEma => return Ok(Layout::Plain),
        Layout::Plain | Layout::Prefixed => Tool::PytorchPosthocEma,
        Layout::Module => Tool::EmaPytorch,
        Layout::Extra => Tool::NitrousEma,
    };
    if owner == tool {
        return Ok(found);
    }
    let why = format!("this is no checkpoint of {tool}, it is laid out as those of {owner}: import it as such");
    Err(Error::unexpected(checkpoint.path(), why))
}

fn found(checkpoint: &Checkpoint) -> Option<Layout> {
    let has = |prefix: &str| [STEP, INITTED].iter().all(|name| checkpoint.has(&format!("{prefix}{name}")));
    let mut others = checkpoint.names().filter(|name| ![STEP, INITTED].contains(name));
    if matches!(checkpoint.values().get(EXTRA), Some(Value::Dict(state)) if state.contains_key(STEP)) {
        Some(Layout::Extra)
    } else if has("") {
        Some(if others.all(|name| name.starts_with(PREFIX)) { Layout::Module } else { Layout::Plain })
    } else {
        has(PREFIX).then_some(Layout::Prefixed)
    }
}

/// `initted` and `step`, where they are tensors.
fn from_tensors(checkpoint: &Checkpoint, prefix: &str) -> Result<(bool, Number)> {
    let number = |name: &str| checkpoint.number(&format!("{prefix}{name}"));
    let initted = match number(INITTED)? {
        Number::Whole(value) => value != 0,
        Number::Rounded(value, _) => value == 1.0,
    };
    Ok((initted, number(STEP)?))
}

/// `initted` and `step`, where they are plain values.
fn from_dict(checkpoint: &Checkpoint) -> Result<(bool, Number)> {
    let state = match checkpoint.values().get(EXTRA) {
        Some(Value::Dict(state)) => (state.get(INITTED), state.get(STEP)),
        _ => (None, None),
    };
    match state {
        (Some(Value::Bool(initted)), Some(Value::Int(step))) => Ok((*initted, Number::Whole(*step))),
        _ => {
            let why = format!("`{EXTRA}` does not hold `{INITTED}`, a truth value, and `{STEP}`, a whole number");
            Err(Error::unexpected(checkpoint.path(), why))
        }
    }
}

fn keys(checkpoint: &Checkpoint, layout: Layout) -> Result<BTreeMap<String, String>> {
    let mut keys = BTreeMap::new();
    for key in checkpoint.names() {
        let state = [STEP, INITTED].contains(&key.strip_prefix(PREFIX).unwrap_or(key));
        let name = match (layout, key.strip_prefix(PREFIX)) {
            (Layout::Plain, _) if [STEP, INITTED].contains(&key) => continue,
            (Layout::Plain, _) => key,
            (Layout::Prefixed, Some(_)) if state => continue,
            (Layout::Module, None) if state => continue,
            (_, Some(name)) => name,
            (_, None) => {
                let why = format!("`{key}` does not begin with `{PREFIX}`, as the others do: it is of another tool");
                return Err(Error::unexpected(checkpoint.path(), why));
            }
        };
        keys.insert(name.to_owned(), key.to_owned());
    }
    Ok(keys)
}
