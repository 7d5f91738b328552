//! A checkpoint, opened: its tensors, wherever they lie in its files.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use super::adapter;
use super::find::{Input, is_pytorch};
use super::steps;
use crate::error::{Error, Result};
#[cfg(feature = "pytorch")]
use crate::pytorch::{Checkpoint, Value};
use crate::snapshot::StoredFile;

use crate::synthesis::{Elements, TensorSource};
use crate::tensor::TensorSpec;
use crate::tensor::{compare_tensors, is_averaged};

/// One file of a checkpoint.
#[derive(Debug)]
pub(super) enum Part {
    /// Mapped, to be blended from.
    Mapped(StoredFile),
    /// A file of PyTorch's, whose elements cannot be mapped. It is opened again when they are needed: open, each file of a
    /// long training would take descriptors.
    #[cfg(feature = "pytorch")]
    Torch(Contents),
}

/// What a file of PyTorch's holds, but for the elements of its tensors.
#[cfg(feature = "pytorch")]
#[derive(Debug)]
pub(super) struct Contents {
    specs: Vec<TensorSpec>,
    values: BTreeMap<String, Value>,
    /// The elements of those that may be scales of adapters.
    scales: BTreeMap<String, Vec<u8>>,
}

#[cfg(feature = "pytorch")]
impl Contents {
    fn read(path: &Path) -> Result<Contents> {
        let file = Checkpoint::open_model(path)?;
        let specs: Vec<TensorSpec> = file.names().map(|name| file.spec(name)).collect::<Result<_>>()?;
        let single = |spec: &&TensorSpec| adapter::may_be_scale(&spec.name, &spec.shape);
        let scales = specs.iter().filter(single).map(|spec| Ok((spec.name.clone(), file.read(&spec.name)?)));
        let scales = scales.collect::<Result<_>>()?;
        Ok(Contents { scales, specs, values: file.values().clone() })
    }
}

/// A tensor of a checkpoint.
#[derive(Debug)]
pub(super) struct Held {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// The index of the part that holds it.
    pub part: usize,
}

/// A checkpoint.
#[derive(Debug)]
pub(super) struct Model {
    pub input: Input,
    pub parts: Vec<Part>,
    /// By name.
    pub tensors: BTreeMap<String, Held>,
}

impl Held {
    /// The bytes of its elements, which a file or the reader of one has found to be there.
    pub(super) fn bytes(&self) -> u64 {
        (self.dtype.bitsize() * self.shape.iter().product::<usize>() / 8) as u64
    }
}

impl Part {
    fn open(path: &Path) -> Result<Part> {
        if !is_pytorch(path) {
            let file = StoredFile::open(path)?;
            if file.metadata().contains_key("history") && file.metadata().contains_key("posthoc_ema") {
                let why = "this is a snapshot of a run, an average itself: use `synthesize` on its directory";
                return Err(Error::unexpected(path, why));
            }
            return Ok(Part::Mapped(file));
        }
        #[cfg(feature = "pytorch")]
        return Contents::read(path).map(Part::Torch);
        #[cfg(not(feature = "pytorch"))]
        Err(Error::unexpected(path, "a file of PyTorch, which a build without the feature `import` cannot read"))
    }

    fn specs(&self) -> Vec<TensorSpec> {
        match self {
            Part::Mapped(file) => {
                let spec = |(name, tensor): (&str, &crate::snapshot::StoredTensor)| TensorSpec {
                    name: name.to_owned(),
                    dtype: tensor.dtype,
                    shape: tensor.shape.clone(),
                };
                file.tensors().iter().map(spec).collect()
            }
            #[cfg(feature = "pytorch")]
            Part::Torch(file) => file.specs.clone(),
        }
    }

    /// The strings of `__metadata__`.
    pub(super) fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            Part::Mapped(file) => file.metadata().clone(),
            #[cfg(feature = "pytorch")]
            Part::Torch(_) => BTreeMap::new(),
        }
    }

    fn number(&self, key: &str) -> Option<u64> {
        match self {
            Part::Mapped(file) => file.metadata().get(key).and_then(|text| steps::parse(text)),
            #[cfg(feature = "pytorch")]
            Part::Torch(file) => match file.values.get(key)? {
                Value::Int(value) => (*value).try_into().ok(),
                _ => None,
            },
        }
    }

    /// The elements of a scale of an adapter.
    fn scale(&self, name: &str) -> Option<&[u8]> {
        match self {
            Part::Mapped(file) => file.tensors().get(name).map(|tensor| file.bytes(tensor)),
            #[cfg(feature = "pytorch")]
            Part::Torch(file) => file.scales.get(name).map(Vec::as_slice),
        }
    }
}

impl Model {
    /// Opens all files and checks them against each other.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`], and [`Error::Unexpected`] for what is no checkpoint of a model.
    pub(super) fn open(input: Input) -> Result<Model> {
        let parts: Vec<Part> = input.parts.iter().map(|path| Part::open(path)).collect::<Result<_>>()?;
        let mut tensors = BTreeMap::new();
        for (i, part) in parts.iter().enumerate() {
            for TensorSpec { name, dtype, shape } in part.specs() {
                check_dtype(&input.parts[i], &name, dtype)?;
                if tensors.insert(name.clone(), Held { dtype, shape, part: i }).is_some() {
                    let why = format!("tensor `{name}` is in another shard too");
                    return Err(Error::damaged(&input.parts[i], why));
                }
            }
        }
        let model = Model { input, parts, tensors };
        model.check_index()?;
        match model.tensors.is_empty() {
            true => Err(Error::unexpected(&model.input.path, "it holds no tensor: leave it out")),
            false => Ok(model),
        }
    }

    fn check_index(&self) -> Result<()> {
        let Some(index) = &self.input.index else { return Ok(()) };
        for (name, file) in &index.weight_map {
            let holds = |held: &Held| self.input.parts[held.part].ends_with(file);
            if !self.tensors.get(name).is_some_and(holds) {
                return Err(Error::damaged(&index.path, format!("tensor `{name}` is not in `{file}`, as it says")));
            }
        }
        Ok(())
    }

    /// A number that all parts agree on, or that one has and the others lack.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        let mut told = self.parts.iter().filter_map(|part| part.number(key));
        let first = told.next()?;
        told.all(|other| other == first).then_some(first)
    }

    /// Checks that the other checkpoint is of the same model, and has the same scales of adapters.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for other names, shapes or dtypes, [`Error::Unexpected`] for other scales.
    pub(super) fn check_sibling(&self, other: &Model) -> Result<()> {
        if let Some(difference) = compare_tensors(self.specs(), other.specs()) {
            return Err(Error::mismatch(&self.input.path, &other.input.path, difference));
        }
        adapter::check_scales(self, other)
    }

    fn specs(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        self.tensors.iter().map(|(name, held)| (name.as_str(), held.dtype, held.shape.as_slice()))
    }

    /// Checks that there is anything to average.
    ///
    /// # Errors
    /// [`Error::Unexpected`].
    pub(super) fn check_averaged(&self) -> Result<()> {
        if self.tensors.keys().any(|name| self.is_averaged(name)) {
            return Ok(());
        }
        let why = "none of its tensors is of floating point, so that there is nothing to average: name checkpoints of a model";
        Err(Error::unexpected(&self.input.path, why))
    }

    /// Whether a tensor is averaged: all of floating point but the scales of low-rank adapters.
    pub(super) fn is_averaged(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|held| is_averaged(held.dtype)) && !adapter::is_scale(&self.tensors, name)
    }

    /// The elements of a scale of an adapter; none where there is no such tensor.
    pub(super) fn scale(&self, name: &str) -> Option<&[u8]> {
        self.parts[self.tensors.get(name)?.part].scale(name)
    }

    /// Whether everything is mapped.
    pub(super) fn is_mapped(&self) -> bool {
        self.parts.iter().all(|part| matches!(part, Part::Mapped(_)))
    }
}

impl TensorSource for Model {
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        let held = self.tensors.get(name)?;
        match &self.parts[held.part] {
            Part::Mapped(file) => Some((held.dtype, Elements::Host(file.bytes(file.tensors().get(name)?)))),
            #[cfg(feature = "pytorch")]
            Part::Torch(_) => None,
        }
    }

    fn will_need(&self, bytes: &[u8]) {
        for part in &self.parts {
            match part {
                Part::Mapped(file) => file.will_need(bytes),
                #[cfg(feature = "pytorch")]
                Part::Torch(_) => {}
            }
        }
    }
}

/// Floating-point dtypes that are too coarse for averages would otherwise be copied as if they were integers.
fn check_dtype(path: &Path, name: &str, dtype: Dtype) -> Result<()> {
    let text = dtype.to_string();
    if is_averaged(dtype) || !text.starts_with(['F', 'C']) {
        return Ok(());
    }
    let why = format!(
        "tensor `{name}` is of {dtype}, which cannot be averaged: average f32, f16, bf16 or f64 and convert it then"
    );
    Err(Error::unexpected(path, why))
}
