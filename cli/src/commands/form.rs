//! Options of the form of averages on disk.

use std::path::PathBuf;

use clap::Args;
use posthoc_ema::{FormOptions, OutputForm};

use super::Failure;
use super::list::Count;

/// Form of averages.
#[derive(Args)]
pub struct FormArgs {
    /// Write folders like this one of a model, as save_pretrained writes it: with its names of tensors, tied tensors,
    /// dtypes and shards, and all of its files but weights and the state of a training. An average that would not load
    /// strictly is refused
    #[arg(long, value_name = "MODEL_DIR")]
    like: Option<PathBuf>,
    /// Split weights into shards of at most this size, with an index, in a folder: 5GB
    #[arg(long, value_name = "SIZE")]
    shard_size: Option<Count>,
    /// Rename tensors by 's/PATTERN/REPLACEMENT/', as sed -E does; by wrappers, which takes away module., _orig_mod.
    /// and the like; or by peft, which takes away an adapter's .default. May be given several times
    #[arg(long, value_name = "RULE")]
    rename: Vec<String>,
}

/// Options of a folder that averages are like, for a run.
#[derive(Args)]
pub struct LikeArgs {
    /// Leave these tensors out: a name or a glob; may be given several times
    #[arg(long, value_name = "GLOB")]
    leave_out: Vec<String>,
    /// Copy files of --like even if they are links that lead out of its folder
    #[arg(long, requires = "like")]
    follow_links: bool,
}

impl FormArgs {
    /// Reads the form for a run.
    pub fn of_run(&self, like: &LikeArgs) -> Result<OutputForm, Failure> {
        self.form(self.like.as_ref(), like.leave_out.clone(), like.follow_links)
    }

    /// Reads the form of a second run's averages, whose folder is `folder`, or that of the first run's.
    pub fn of_second_run(&self, folder: Option<&PathBuf>, like: &LikeArgs) -> Result<OutputForm, Failure> {
        self.form(folder.or(self.like.as_ref()), like.leave_out.clone(), like.follow_links)
    }

    /// Reads the form for checkpoints. What is left out of them is left out of the folder, too.
    pub fn of_checkpoints(&self, leave_out: &[String]) -> Result<OutputForm, Failure> {
        let leave_out = if self.like.is_some() { leave_out.to_vec() } else { Vec::new() };
        self.form(self.like.as_ref(), leave_out, false)
    }

    fn form(&self, like: Option<&PathBuf>, leave_out: Vec<String>, follow_links: bool) -> Result<OutputForm, Failure> {
        let options = FormOptions {
            like: like.cloned(),
            shard_size: self.shard_size.map(|size| size.0),
            rename: self.rename.clone(),
            leave_out,
            follow_links,
        };
        OutputForm::new(&options).map_err(Failure::of_argument)
    }
}
