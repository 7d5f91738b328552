//! One file of a checkpoint's weights.

use std::collections::BTreeMap;
use std::path::Path;

#[cfg(feature = "pytorch")]
use super::adapter;
use super::find::is_pytorch;
use crate::error::{Error, Result};
#[cfg(feature = "pytorch")]
use crate::pytorch::{Checkpoint, Value};
use crate::snapshot::StoredFile;
use crate::tensor::TensorSpec;

/// File of a checkpoint's weights, opened.
#[derive(Debug)]
pub(super) enum WeightFile {
    /// Safetensors file, mapped.
    Mapped(StoredFile),
    /// PyTorch file, whose elements cannot be mapped.
    ///
    /// It is opened again when its elements are needed: kept open, the files of a long training would take too many
    /// descriptors.
    #[cfg(feature = "pytorch")]
    Torch(TorchContents),
}

/// Contents of a PyTorch file, without most elements of its tensors.
#[cfg(feature = "pytorch")]
#[derive(Debug)]
pub(super) struct TorchContents {
    specs: Vec<TensorSpec>,
    values: BTreeMap<String, Value>,
    /// Elements of the tensors that may be scales of adapters.
    scales: BTreeMap<String, Vec<u8>>,
}

#[cfg(feature = "pytorch")]
impl TorchContents {
    fn read(path: &Path) -> Result<TorchContents> {
        let checkpoint = Checkpoint::open_model(path)?;
        let specs: Vec<TensorSpec> = checkpoint.names().map(|name| checkpoint.spec(name)).collect::<Result<_>>()?;
        let mut scales = BTreeMap::new();
        for TensorSpec { name, shape, .. } in &specs {
            if adapter::may_be_scale(name, shape) {
                scales.insert(name.clone(), checkpoint.read(name)?);
            }
        }
        Ok(TorchContents { specs, values: checkpoint.values().clone(), scales })
    }
}

impl WeightFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`], and [`Error::Unexpected`] for a snapshot of a run, or for a PyTorch file in a
    /// build without the feature `pytorch`.
    pub(super) fn open(path: &Path) -> Result<WeightFile> {
        if is_pytorch(path) {
            return WeightFile::open_pytorch(path);
        }
        let file = StoredFile::open(path)?;
        if file.metadata().contains_key("history") && file.metadata().contains_key("posthoc_ema") {
            let why = "this is a snapshot of a run, and so an average itself: use `synthesize` on its directory";
            return Err(Error::unexpected(path, why));
        }
        Ok(WeightFile::Mapped(file))
    }

    #[cfg(feature = "pytorch")]
    fn open_pytorch(path: &Path) -> Result<WeightFile> {
        TorchContents::read(path).map(WeightFile::Torch)
    }

    #[cfg(not(feature = "pytorch"))]
    fn open_pytorch(path: &Path) -> Result<WeightFile> {
        Err(Error::unexpected(path, "a PyTorch file, which a build without the feature `pytorch` cannot read"))
    }

    /// Returns the tensors without their elements.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        match self {
            WeightFile::Mapped(file) => {
                let mut specs = Vec::new();
                for (name, tensor) in file.tensors().iter() {
                    let shape = tensor.shape.clone();
                    specs.push(TensorSpec { name: name.to_owned(), dtype: tensor.dtype, shape });
                }
                specs
            }
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(contents) => contents.specs.clone(),
        }
    }

    /// Returns the strings of `__metadata__`; none for a PyTorch file.
    pub(super) fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            WeightFile::Mapped(file) => file.metadata().clone(),
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(_) => BTreeMap::new(),
        }
    }

    /// Returns a whole number from the metadata, or from the plain values of a PyTorch file.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self {
            WeightFile::Mapped(file) => file.metadata().get(key)?.trim().parse().ok(),
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(contents) => match contents.values.get(key)? {
                Value::Int(value) => (*value).try_into().ok(),
                _ => None,
            },
        }
    }

    /// Returns the elements of a tensor that may be the scale of an adapter.
    pub(super) fn scale(&self, name: &str) -> Option<&[u8]> {
        match self {
            WeightFile::Mapped(file) => file.tensors().get(name).map(|tensor| file.bytes(tensor)),
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(contents) => contents.scales.get(name).map(Vec::as_slice),
        }
    }
}
