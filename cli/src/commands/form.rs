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
    /// Reads the form. `like` has the options of a run; checkpoints have their own.
    pub fn form(&self, like: Option<&LikeArgs>) -> Result<OutputForm, Failure> {
        let options = FormOptions {
            like: self.like.clone(),
            shard_size: self.shard_size.map(|size| size.0),
            rename: self.rename.clone(),
            leave_out: like.map_or(Vec::new(), |like| like.leave_out.clone()),
            follow_links: like.is_some_and(|like| like.follow_links),
        };
        OutputForm::new(&options).map_err(Failure::of_argument)
    }
}
