//! One file of a checkpoint's weights.

use std::collections::BTreeMap;
use std::path::Path;
#[cfg(feature = "pytorch")]
use std::sync::{Mutex, PoisonError};

#[cfg(feature = "pytorch")]
use super::distributed;
use super::find::is_pytorch;
use super::options::ReadOptions;
#[cfg(feature = "pytorch")]
use super::parts::PartsFolder;
#[cfg(feature = "pytorch")]
use super::sharded;
use crate::error::{Error, Result};
#[cfg(feature = "pytorch")]
use crate::pytorch::{Checkpoint, DeepSpeedModel, TensorFile};
use crate::snapshot::StoredFile;
use crate::synthesis::Elements;
use crate::tensor::TensorSpec;

/// Keys of the step in metadata and in PyTorch files; the last is that of kohya's scripts.
pub(super) const STEP_KEYS: [&str; 4] = ["step", "global_step", "steps", "ss_steps"];

/// Key of the epoch, which is the step in the names of some trainers' files.
pub(super) const EPOCH_KEY: &str = "epoch";

/// File of a checkpoint's weights, mapped.
#[derive(Debug)]
pub(crate) enum WeightFile {
    Safetensors(StoredFile),
    #[cfg(feature = "pytorch")]
    Torch(TorchWeights),
}

/// Tensors of a PyTorch file, and what is known of the model beside them.
#[cfg(feature = "pytorch")]
#[derive(Debug)]
pub(crate) struct TorchWeights {
    pub tensors: TensorFile,
    /// Whole numbers that may be the step.
    numbers: BTreeMap<&'static str, u64>,
    /// Key of the entry that holds the model, and keys of others that hold weights too.
    pub key: Option<String>,
    pub other_models: Vec<String>,
    /// Entries of the model that were left out.
    left_out: Vec<String>,
    /// Entries of the model that are None.
    pub nones: Vec<String>,
    /// Note on which weights were taken.
    pub note: Option<&'static str>,
}

/// Lock for parsing a pickle, whose values may take much memory until its tensors are known.
#[cfg(feature = "pytorch")]
static PARSING: Mutex<()> = Mutex::new(());

#[cfg(feature = "pytorch")]
impl TorchWeights {
    fn read(path: &Path, options: &ReadOptions) -> Result<TorchWeights> {
        let _one_at_a_time = PARSING.lock().unwrap_or_else(PoisonError::into_inner);
        let checkpoint = Checkpoint::open_model(path, options.key.as_deref(), &options.leave_out)?;
        let mut numbers = BTreeMap::new();
        for key in STEP_KEYS.into_iter().chain([EPOCH_KEY]) {
            if let Some(number) = checkpoint.int(&[key]).and_then(|number| number.try_into().ok()) {
                numbers.insert(key, number);
            }
        }
        let key = checkpoint.key().map(str::to_owned);
        let [other_models, left_out, nones] =
            [checkpoint.other_models(), checkpoint.left_out(), checkpoint.nones()].map(<[String]>::to_vec);
        let new = TorchWeights::new(checkpoint.into_tensors());
        Ok(TorchWeights { numbers, key, other_models, left_out, nones, ..new })
    }

    /// Reads a folder whose files hold parts of tensors.
    fn read_parts(kind: PartsFolder, folder: &Path, options: &ReadOptions) -> Result<TorchWeights> {
        let _one_at_a_time = PARSING.lock().unwrap_or_else(PoisonError::into_inner);
        match kind {
            PartsFolder::Distributed => {
                let (tensors, key, left_out) = distributed::read(folder, options)?;
                Ok(TorchWeights { key, left_out, ..TorchWeights::new(tensors) })
            }
            PartsFolder::Shards => {
                check_no_key(folder, options)?;
                let (tensors, left_out) = sharded::read(folder, options)?;
                Ok(TorchWeights { left_out, ..TorchWeights::new(tensors) })
            }
            PartsFolder::DeepSpeed => {
                let read = DeepSpeedModel::open(folder, options.key.as_deref(), &options.leave_out)?;
                let numbers = read.step.map(|step| (STEP_KEYS[1], step)).into_iter().collect();
                let DeepSpeedModel { tensors, left_out, nones, note, .. } = read;
                Ok(TorchWeights { numbers, left_out, nones, note, ..TorchWeights::new(tensors) })
            }
        }
    }

    fn new(tensors: TensorFile) -> TorchWeights {
        let (numbers, key, note) = Default::default();
        let [other_models, left_out, nones] = [const { Vec::new() }; 3];
        TorchWeights { tensors, numbers, key, other_models, left_out, nones, note }
    }
}

/// Refuses a key for a safetensors file.
fn check_no_key(path: &Path, options: &ReadOptions) -> Result<()> {
    let Some(key) = &options.key else { return Ok(()) };
    let why = format!("a safetensors file has no entry `{key}`: --key (`key`) is for training checkpoints of PyTorch");
    Err(Error::unexpected(path, why))
}

impl WeightFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`], and [`Error::Unexpected`] for a snapshot of a run, for parts of tensors, for
    /// a key of a file that has none, or for a PyTorch file in a build without the feature `pytorch`.
    pub(super) fn open(path: &Path, options: &ReadOptions) -> Result<WeightFile> {
        if is_pytorch(path) || path.is_dir() {
            return WeightFile::open_pytorch(path, options);
        }
        check_no_key(path, options)?;
        let file = StoredFile::open(path)?;
        if file.metadata().contains_key("history") && file.metadata().contains_key("posthoc_ema") {
            let why = "this is a snapshot of a run, and so an average itself: use `synthesize` on its directory";
            return Err(Error::unexpected(path, why));
        }
        #[cfg(feature = "pytorch")]
        if file.metadata().contains_key(sharded::SHARDING) && !sharded::is_whole(&file)? {
            let why =
                "a shard of a distributed checkpoint, which holds parts of tensors: name the folder of all shards";
            return Err(Error::unexpected(path, why));
        }
        Ok(WeightFile::Safetensors(file))
    }

    #[cfg(feature = "pytorch")]
    fn open_pytorch(path: &Path, options: &ReadOptions) -> Result<WeightFile> {
        let read = match PartsFolder::of(path) {
            Some(kind) => TorchWeights::read_parts(kind, path, options),
            None => TorchWeights::read(path, options),
        };
        read.map(WeightFile::Torch)
    }

    #[cfg(not(feature = "pytorch"))]
    fn open_pytorch(path: &Path, _: &ReadOptions) -> Result<WeightFile> {
        Err(Error::unexpected(path, "a PyTorch file, which a build without the feature `pytorch` cannot read"))
    }

    /// Returns the tensors without their elements.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        match self {
            WeightFile::Safetensors(file) => {
                let mut specs = Vec::new();
                for (name, tensor) in file.tensors().iter() {
                    let shape = tensor.shape.clone();
                    specs.push(TensorSpec { name: name.to_owned(), dtype: tensor.dtype, shape });
                }
                specs
            }
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(file) => file.tensors.names().filter_map(|name| file.tensors.spec(name).ok()).collect(),
        }
    }

    /// Returns the names of entries that were left out when the file was read.
    pub(super) fn left_out(&self) -> &[String] {
        match self {
            WeightFile::Safetensors(_) => &[],
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(file) => &file.left_out,
        }
    }

    /// Returns the strings of `__metadata__`; none for a PyTorch file.
    pub(crate) fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            WeightFile::Safetensors(file) => file.metadata().clone(),
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(_) => BTreeMap::new(),
        }
    }

    /// Returns a whole number from the metadata, or from the plain values of a PyTorch file.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self {
            WeightFile::Safetensors(file) => file.metadata().get(key)?.trim().parse().ok(),
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(file) => file.numbers.get(key).copied(),
        }
    }

    /// Returns the elements of a tensor; `None` if the file lacks it.
    pub(super) fn elements(&self, name: &str) -> Option<Elements<'_>> {
        match self {
            WeightFile::Safetensors(file) => file.tensors().get(name).map(|tensor| Elements::Host(file.bytes(tensor))),
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(file) => match file.tensors.stored(name) {
                Some(bytes) => Some(Elements::Host(bytes)),
                None => file.tensors.scattered(name).map(Elements::Scattered),
            },
        }
    }

    /// Starts to read bytes of the file from the disk in the background.
    pub(super) fn will_need(&self, bytes: &[u8]) {
        match self {
            WeightFile::Safetensors(file) => file.will_need(bytes),
            #[cfg(feature = "pytorch")]
            WeightFile::Torch(file) => file.tensors.will_need(bytes),
        }
    }
}
