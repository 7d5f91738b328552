//! Form of averages on disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::rename::RenameRule;
use crate::checkpoint::{CheckpointModel, open_folder};
use crate::error::{Error, Result};
use crate::tensor::NamePatterns;

/// Options of [`OutputForm::new`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FormOptions {
    /// Folder of a model, as `save_pretrained` of transformers, diffusers or PEFT writes it. An average becomes a
    /// folder of that form: its names, tied tensors, dtypes and shards, and all of its files but weights and the state
    /// of a training.
    pub like: Option<PathBuf>,
    /// Largest size of a shard in bytes. The average becomes a folder with an index, if it needs more than one.
    pub shard_size: Option<u64>,
    /// Rules that rename tensors, one after the other: `s/PATTERN/REPLACEMENT/` with an extended regular expression,
    /// as of `sed -E`; `wrappers`, which takes away `module.`, `_orig_mod.` and the like; or `peft`, which takes away
    /// the name `default` of an adapter.
    pub rename: Vec<String>,
    /// Names or globs of tensors to leave out, as they are called before they are renamed.
    pub leave_out: Vec<String>,
    /// Copies files of the folder even if they are links that lead out of it.
    pub follow_links: bool,
}

/// Form of averages on disk: like the folder of a model, in shards, or under other names.
///
/// ```no_run
/// use posthoc_ema::{At, FormOptions, Output, OutputForm, Profile, Run};
///
/// let run = Run::open("runs/ema")?;
/// let plan = run.plan(Profile::sigma_rel(0.1)?, At::Latest)?;
/// let options = FormOptions { like: Some("gpt2".into()), shard_size: Some(5_000_000_000), ..Default::default() };
/// let form = OutputForm::new(&options)?;
/// run.write_as(&[Output { plan: &plan, path: "gpt2-averaged".as_ref() }], &form, &Default::default())?;
/// # Ok::<(), posthoc_ema::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct OutputForm {
    /// Options that it was made of, with an absolute path.
    pub(crate) options: FormOptions,
    pub(super) like: Option<CheckpointModel>,
    pub(super) shard_size: Option<u64>,
    pub(super) rename: Vec<RenameRule>,
    pub(super) leave_out: NamePatterns,
    pub(super) follow_links: bool,
}

impl FormOptions {
    /// Returns true if an average becomes a folder.
    pub(crate) fn is_folder(&self) -> bool {
        self.like.is_some() || self.shard_size.is_some()
    }
}

impl OutputForm {
    /// Reads the folder, and compiles rules and patterns.
    ///
    /// # Errors
    /// [`Error::Setting`] for a rule, a pattern or a size that cannot be used; [`Error::Unexpected`], [`Error::Io`] and
    /// [`Error::Damaged`] for a folder that is not one of a model.
    pub fn new(options: &FormOptions) -> Result<OutputForm> {
        let FormOptions { like, shard_size, rename, leave_out, follow_links } = options;
        if *shard_size == Some(0) {
            return Err(Error::Setting { option: "shard_size", reason: "0 bytes hold no tensor: try 5 GB".into() });
        }
        let absolute = |dir: &PathBuf| dir.canonicalize().map_err(Error::io("read", dir));
        let options = FormOptions { like: like.as_ref().map(absolute).transpose()?, ..options.clone() };
        Ok(OutputForm {
            options,
            like: like.as_ref().map(|dir| open_folder(dir, leave_out)).transpose()?,
            shard_size: *shard_size,
            rename: rename.iter().map(|rule| RenameRule::new(rule)).collect::<Result<_>>()?,
            leave_out: NamePatterns::new("leave_out", leave_out)?,
            follow_links: *follow_links,
        })
    }

    /// Returns true if averages are written as they are without a form.
    pub(crate) fn is_plain(&self) -> bool {
        self.like.is_none() && self.shard_size.is_none() && self.rename.is_empty() && self.leave_out.is_empty()
    }

    /// Returns the options that it was made of, with an absolute path; `None` if averages are written as without it.
    pub fn recorded(&self) -> Option<FormOptions> {
        (!self.is_plain()).then(|| self.options.clone())
    }

    /// Returns the names of the tensors of the folder that are left out.
    pub fn left_out(&self) -> &[String] {
        self.like.as_ref().map_or(&[], |like| &like.left_out)
    }

    /// Returns the folder that averages are like.
    pub(crate) fn folder(&self) -> impl Iterator<Item = &PathBuf> {
        self.like.iter().filter_map(|like| like.found.folder.as_ref())
    }

    /// Returns true if an average becomes a folder, whatever it is made of.
    pub fn is_folder(&self) -> bool {
        self.options.is_folder()
    }
}
