//! Layouts of the tools' checkpoints: which entries are the model's tensors, and which are the tool's own state.

use std::collections::BTreeMap;
use std::fmt;

use super::Tool;
use crate::error::{Error, Result};
use crate::pytorch::{Checkpoint, Number};

/// Prefix of the model's tensors in most layouts.
const PREFIX: &str = "ema_model.";

const STEP: &str = "step";
const INITTED: &str = "initted";
const EXTRA: &str = "_extra_state";

/// Places of the model and of the tool's state in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CheckpointLayout {
    /// Names of the model, with `initted` and `step` among them: pytorch-posthoc-ema since 1.0.6.
    Plain,
    /// As `Plain`, with a prefix before every name: pytorch-posthoc-ema up to 1.0.5.
    Prefixed,
    /// A prefix before the model's names, `initted` and `step` without one: ema-pytorch.
    Module,
    /// A prefix before the model's names, `initted` and `step` in a dict: nitrous-ema.
    Extra,
}

impl fmt::Display for CheckpointLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CheckpointLayout::Plain => "that of pytorch-posthoc-ema since 1.0.6",
            CheckpointLayout::Prefixed => "that of pytorch-posthoc-ema up to 1.0.5",
            CheckpointLayout::Module => "that of ema-pytorch",
            CheckpointLayout::Extra => "that of nitrous-ema",
        })
    }
}

/// Checkpoint in the model's own names.
pub(super) struct ParsedCheckpoint {
    pub layout: CheckpointLayout,
    /// Another tool that uses this layout and more likely wrote the checkpoint.
    pub likelier_tool: Option<Tool>,
    /// Name of each tensor in the file, by the model's name.
    pub keys: BTreeMap<String, String>,
    /// The tool's own count.
    pub counted: Number,
    /// Entries that are neither tensors of the model nor state of the tool.
    pub ignored: Vec<String>,
}

impl ParsedCheckpoint {
    /// Finds the layout of a checkpoint and reads the tool's state.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for a checkpoint of another tool or of none, and for one from before the first update.
    pub(super) fn new(tool: Tool, checkpoint: &Checkpoint) -> Result<ParsedCheckpoint> {
        let detected = detect(checkpoint);
        let layout = check_tool(tool, checkpoint, detected)?;
        let (initted, counted) = match layout {
            CheckpointLayout::Extra => state_in_dict(checkpoint)?,
            CheckpointLayout::Prefixed => state_in_tensors(checkpoint, PREFIX)?,
            CheckpointLayout::Plain | CheckpointLayout::Module => state_in_tensors(checkpoint, "")?,
        };
        if !initted {
            let why = "`initted` says that no average had begun: move the file out of the directory";
            return Err(Error::unexpected(checkpoint.path(), why));
        }
        let keys = keys(checkpoint, layout)?;
        if keys.is_empty() {
            let why = "it holds no tensor of a model: move it out of the directory";
            return Err(Error::unexpected(checkpoint.path(), why));
        }
        let is_known = |key: &str| layout == CheckpointLayout::Extra && key == EXTRA;
        let ignored = checkpoint.beside().filter(|key| !is_known(key)).map(str::to_owned).collect();
        let unlikely = layout == CheckpointLayout::Plain && detected == Some(CheckpointLayout::Module);
        let likelier_tool = unlikely.then_some(Tool::EmaPytorch);
        Ok(ParsedCheckpoint { layout, likelier_tool, keys, counted, ignored })
    }
}

/// Checks that a layout is one of the tool's, and returns it as the tool reads it.
fn check_tool(tool: Tool, checkpoint: &Checkpoint, detected: Option<CheckpointLayout>) -> Result<CheckpointLayout> {
    let Some(layout) = detected else {
        let why =
            format!("not a checkpoint of {tool}: it lacks `{STEP}` and `{INITTED}`; move it out of the directory");
        return Err(Error::unexpected(checkpoint.path(), why));
    };
    let owner = match layout {
        // All of the model may be in a module called `ema_model`.
        CheckpointLayout::Plain | CheckpointLayout::Module if tool == Tool::PytorchPosthocEma => {
            return Ok(CheckpointLayout::Plain);
        }
        CheckpointLayout::Plain | CheckpointLayout::Prefixed => Tool::PytorchPosthocEma,
        CheckpointLayout::Module => Tool::EmaPytorch,
        CheckpointLayout::Extra => Tool::NitrousEma,
    };
    if owner == tool {
        return Ok(layout);
    }
    let why = format!("this is not a checkpoint of {tool}, it is laid out as those of {owner}: import it as such");
    Err(Error::unexpected(checkpoint.path(), why))
}

fn detect(checkpoint: &Checkpoint) -> Option<CheckpointLayout> {
    if checkpoint.int(&[EXTRA, STEP]).is_some() {
        return Some(CheckpointLayout::Extra);
    }
    let has_state = |prefix: &str| [STEP, INITTED].iter().all(|name| checkpoint.has(&format!("{prefix}{name}")));
    if has_state("") {
        let mut others = checkpoint.names().filter(|name| !is_state(name));
        let prefixed = others.all(|name| name.starts_with(PREFIX));
        return Some(if prefixed { CheckpointLayout::Module } else { CheckpointLayout::Plain });
    }
    has_state(PREFIX).then_some(CheckpointLayout::Prefixed)
}

fn is_state(name: &str) -> bool {
    [STEP, INITTED].contains(&name)
}

/// Reads `initted` and `step` from tensors.
fn state_in_tensors(checkpoint: &Checkpoint, prefix: &str) -> Result<(bool, Number)> {
    let number = |name: &str| checkpoint.number(&format!("{prefix}{name}"));
    let initted = match number(INITTED)? {
        Number::Whole(value) => value != 0,
        Number::Rounded(value, _) => value == 1.0,
    };
    Ok((initted, number(STEP)?))
}

/// Reads `initted` and `step` from a dict of plain values.
fn state_in_dict(checkpoint: &Checkpoint) -> Result<(bool, Number)> {
    if let Some(initted) = checkpoint.bool(&[EXTRA, INITTED])
        && let Some(step) = checkpoint.int(&[EXTRA, STEP])
    {
        return Ok((initted, Number::Whole(step)));
    }
    let why = format!("`{EXTRA}` does not hold `{INITTED}`, a truth value, and `{STEP}`, a whole number");
    Err(Error::unexpected(checkpoint.path(), why))
}

/// Maps the model's names to those in the file.
fn keys(checkpoint: &Checkpoint, layout: CheckpointLayout) -> Result<BTreeMap<String, String>> {
    let mut keys = BTreeMap::new();
    for key in checkpoint.names() {
        let stripped = key.strip_prefix(PREFIX);
        let state = match layout {
            CheckpointLayout::Plain => is_state(key),
            CheckpointLayout::Prefixed => stripped.is_some_and(is_state),
            CheckpointLayout::Module => is_state(key),
            CheckpointLayout::Extra => false,
        };
        if state {
            continue;
        }
        let name = if layout == CheckpointLayout::Plain { Some(key) } else { stripped };
        let Some(name) = name else {
            let why = format!("`{key}` does not begin with `{PREFIX}`, as the others do: it is of another tool");
            return Err(Error::unexpected(checkpoint.path(), why));
        };
        keys.insert(name.to_owned(), key.to_owned());
    }
    Ok(keys)
}
