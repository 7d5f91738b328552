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
    /// Names that a pattern may match instead: of tensors that only the folder has that averages are written like
    /// ([`OutputForm::left_out`](crate::OutputForm::left_out)).
    pub other_names: Vec<String>,
    /// Settings of `config.json`, `params.json` and other configurations in which the checkpoints may differ: keys,
    /// joined by dots, or globs. They need not occur.
    pub ignore_config: Vec<String>,
    /// Average of low-rank adapters.
    pub product: AdapterProduct,
}

/// Average of the two factors of a low-rank adapter, whose product `B A` is what it adds to a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdapterProduct {
    /// Averages each factor. The product of the averages is not the average of the products.
    #[default]
    Factors,
    /// Averages the products, each with its scale, and cuts them back to the rank of the factors by a singular value
    /// decomposition: the nearest product of that rank (Eckart and Young, 1936).
    Svd,
}

/// Compiled options.
pub(super) struct ReadOptions {
    pub key: Option<String>,
    pub copy: NamePatterns,
    pub leave_out: NamePatterns,
    pub ignore_config: NamePatterns,
    pub product: AdapterProduct,
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
            ignore_config: NamePatterns::new("ignore_config", &options.ignore_config)?,
            product: options.product,
        })
    }
}
