//! The tensors that a header tells of.

use std::ops::Range;

use safetensors::Dtype;

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// The element type in the file.
    pub dtype: Dtype,
    /// The shape.
    pub shape: Vec<usize>,
    /// Its bytes within the file's data section.
    pub(super) range: Range<usize>,
}

/// The tensors of a file, in order of their names.
#[derive(Debug, PartialEq, Eq)]
pub struct StoredTensors(Vec<(String, StoredTensor)>);

impl StoredTensors {
    /// Sorts tensors; a name that occurs twice is returned as the error.
    pub(super) fn new(mut tensors: Vec<(String, StoredTensor)>) -> Result<StoredTensors, String> {
        tensors.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        match tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err(pair[0].0.clone()),
            None => Ok(StoredTensors(tensors)),
        }
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        let found = self.0.binary_search_by(|(own, _)| own.as_str().cmp(name));
        found.ok().map(|i| &self.0[i].1)
    }

    /// All tensors, by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &StoredTensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// All names, in order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A tensor by its place in the order of names.
    pub(super) fn at(&self, i: usize) -> (&str, &StoredTensor) {
        let (name, tensor) = &self.0[i];
        (name, tensor)
    }

    /// The bytes of all tensors, which lie side by side.
    pub(super) fn data_len(&self) -> usize {
        self.0.iter().map(|(_, tensor)| tensor.range.end).max().unwrap_or(0)
    }
}
