//! Tensors that a header lists.

use std::ops::Range;

use safetensors::Dtype;

/// Tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Element type in the file.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Byte range within the data section of the file.
    pub(super) range: Range<usize>,
}

/// Tensors of a file, in order of their names.
#[derive(Debug, PartialEq, Eq)]
pub struct StoredTensors(Vec<(String, StoredTensor)>);

impl StoredTensors {
    /// Sorts tensors by name. The error is a name that occurs twice.
    pub(super) fn new(mut tensors: Vec<(String, StoredTensor)>) -> Result<StoredTensors, String> {
        tensors.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        match tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err(pair[0].0.clone()),
            None => Ok(StoredTensors(tensors)),
        }
    }

    /// Returns the tensor of that name.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        let found = self.0.binary_search_by(|(own, _)| own.as_str().cmp(name));
        found.ok().map(|i| &self.0[i].1)
    }

    /// Iterates over all tensors, by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &StoredTensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Iterates over all names, in order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if the file has no tensors.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the tensor at a position in the order of names.
    pub(super) fn at(&self, i: usize) -> (&str, &StoredTensor) {
        let (name, tensor) = &self.0[i];
        (name, tensor)
    }

    /// Returns the number of bytes of all tensors, which follow each other without gaps.
    pub(super) fn data_len(&self) -> usize {
        self.0.iter().map(|(_, tensor)| tensor.range.end).max().unwrap_or(0)
    }
}
