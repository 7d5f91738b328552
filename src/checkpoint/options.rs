//! Options of how checkpoints are read.

use crate::error::Result;
use crate::tensor::NamePatterns;

/// Options of [`Checkpoints::open_with`](crate::Checkpoints::open_with).
///
/// Patterns are names or globs (`encoder.*`); each must match a tensor.
#[derive(Clone, Debug, Default)]
pub struct CheckpointOptions {
    /// Steps in the order of the paths; by default they are read.
    pub steps: Option<Vec<u64>>,
    /// Key of the entry that holds the model in a training checkpoint of PyTorch, or keys that lead to it, joined by
    /// dots; by default it is found by the names that trainers use.
    pub key: Option<String>,
    /// Tensors to copy from the newest checkpoint instead of averaging them.
    pub copy: Vec<String>,
    /// Tensors, or other entries of the model, to leave out of the average.
    pub leave_out: Vec<String>,
}

/// Compiled options.
pub(super) struct ReadOptions {
    pub key: Option<String>,
    pub copy: NamePatterns,
    pub leave_out: NamePatterns,
}

impl ReadOptions {
    /// Compiles the patterns.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for a pattern that is not a glob.
    pub(super) fn new(options: &CheckpointOptions) -> Result<ReadOptions> {
        Ok(ReadOptions {
            key: options.key.clone(),
            copy: NamePatterns::new("copy", &options.copy)?,
            leave_out: NamePatterns::new("leave_out", &options.leave_out)?,
        })
    }
}
