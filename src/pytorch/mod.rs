//! Checkpoints of PyTorch (`.pt`): a dict of tensors and of plain values beside them. No code that a file may name is ever
//! run, and an entry that is an object is refused.

mod guard;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pytorch_reader::{DType, FileFormat, PickleError, PickleValue, PytorchError, PytorchReader, Tensor};
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::tensor::TensorSpec;

/// A checkpoint, its pickle read whole and its tensors' elements still in the file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    values: BTreeMap<String, Value>,
}

/// An entry that is no tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A dict.
    Dict(BTreeMap<String, Value>),
    /// Anything else: of no use here, and harmless.
    Other,
}

/// A number that a checkpoint holds, as a tensor of one element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// A whole number, exact.
    Whole(i64),
    /// A number that was rounded to a floating-point dtype.
    Rounded(f64, Dtype),
}

impl Checkpoint {
    /// Opens a checkpoint and reads all but the elements of its tensors.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::Damaged`] where it is no whole file of PyTorch's, and
    /// [`Error::Unexpected`] where it holds anything but tensors and plain values, or is no regular file, or is one that
    /// would grow beyond measure when it is read.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let (root, mut found) = parse(path)?;
        Checkpoint::of(path, root, &mut found)
    }

    /// As [`Checkpoint::open`], of a file that a training may have written: where a dict in it holds the model, its tensors are
    /// taken, and what lies beside it are the values, whole numbers in tensors among them.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and [`Error::Unexpected`] where there is no model, or more than one.
    pub fn open_model(path: &Path) -> Result<Checkpoint> {
        let (mut root, mut found) = parse(path)?;
        let Some(key) = model_key(path, &root)? else {
            return Checkpoint::of(path, root, &mut found);
        };
        let Some(PickleValue::Dict(model)) = root.remove(key) else {
            return Err(Error::unexpected(path, format!("`{key}` is no dict of tensors")));
        };
        let mut own =
            model.keys().filter_map(|name| Some((name.clone(), found.remove(&format!("{key}.{name}"))?))).collect();
        let Checkpoint { tensors, .. } = Checkpoint::of(path, model, &mut own)?;
        let mut beside = Checkpoint::of(path, root, &mut found)?;
        let whole = |name: &str| match beside.number(name) {
            Ok(Number::Whole(value)) => Some((name.to_owned(), Value::Int(value))),
            _ => None,
        };
        let whole: Vec<(String, Value)> = beside.names().filter_map(whole).collect();
        beside.values.extend(whole);
        Ok(Checkpoint { tensors, ..beside })
    }

    /// Parts the entries of a dict into tensors and values.
    fn of(path: &Path, dict: HashMap<String, PickleValue>, found: &mut HashMap<String, Tensor>) -> Result<Checkpoint> {
        let (mut tensors, mut values) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in dict {
            match found.remove(&name) {
                Some(tensor) => drop(tensors.insert(name, tensor)),
                None => drop(values.insert(name.clone(), plain(path, &name, value)?)),
            }
        }
        Ok(Checkpoint { path: path.to_owned(), tensors, values })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The entries that are no tensors.
    pub fn values(&self) -> &BTreeMap<String, Value> {
        &self.values
    }

    /// What a tensor is, without its elements.
    pub fn spec(&self, name: &str) -> Result<TensorSpec> {
        let tensor = self.tensor(name)?;
        Ok(TensorSpec { name: name.to_owned(), dtype: dtype(tensor.dtype()), shape: tensor.shape().to_vec() })
    }

    /// The elements of a tensor in C order, little endian, whatever its strides.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Damaged`] where the file does not hold them.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let damaged = |error: std::io::Error| match error.raw_os_error() {
            Some(_) => Error::io("read", &self.path)(error),
            None => Error::damaged(&self.path, error),
        };
        self.tensor(name)?.read().map_err(damaged)
    }

    /// The one element of a tensor.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for a tensor of another number of elements, and as [`Checkpoint::read`].
    pub fn number(&self, name: &str) -> Result<Number> {
        let spec = self.spec(name)?;
        if spec.shape.iter().product::<usize>() != 1 {
            let why = format!("`{name}` has the shape {:?}, and a single number is expected", spec.shape);
            return Err(Error::unexpected(&self.path, why));
        }
        let bytes = self.read(name)?;
        number(spec.dtype, &bytes).ok_or_else(|| {
            Error::unexpected(&self.path, format!("`{name}` of {} is no number that can be understood", spec.dtype))
        })
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::unexpected(&self.path, format!("there is no tensor `{name}`")))
    }
}

/// The entries of a file, and its tensors by the names of the entries that lead to them, joined by dots.
fn parse(path: &Path) -> Result<(HashMap<String, PickleValue>, HashMap<String, Tensor>)> {
    let length = guard::check_file(path)?;
    let reader = PytorchReader::new(path).map_err(|error| refused(path, error))?;
    // Old archives are read into memory whole, and what else there is holds no tensors; none of the tools writes them.
    if !matches!(reader.metadata().format_type, FileFormat::Zip | FileFormat::Legacy) {
        return Err(Error::damaged(path, "no checkpoint that `torch.save` of PyTorch 1.0 or later writes"));
    }
    let root = PytorchReader::read_pickle_data(path, None).map_err(|error| refused(path, error))?;
    let PickleValue::Dict(root) = root else {
        return Err(Error::damaged(path, "no dict of tensors"));
    };
    let found = reader.into_tensors();
    guard::check_tensors(path, length, &root, &found)?;
    Ok((root, found))
}

/// Where trainings keep the model in their checkpoints.
const MODELS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// The entry that holds the model; none where its tensors are at the top.
fn model_key(path: &Path, root: &HashMap<String, PickleValue>) -> Result<Option<&'static str>> {
    let holds = |value: &PickleValue| matches!(value, PickleValue::Dict(dict) if dict.values().any(is_tensor));
    let known: Vec<&'static str> = MODELS.into_iter().filter(|key| root.get(*key).is_some_and(holds)).collect();
    let other = root.iter().filter(|(_, value)| holds(value)).map(|(key, _)| key).min();
    let why = match (known.as_slice(), root.values().any(is_tensor), other) {
        ([key], ..) => return Ok(Some(key)),
        ([], true, None) => return Ok(None),
        ([], true, Some(other)) => {
            format!("tensors are at its top and in `{other}`: save the model's state dict alone")
        }
        ([], false, _) => {
            let known = MODELS.join("`, `");
            format!("no tensors are at its top, nor in `{known}`: save the model's state dict alone")
        }
        ([first, second, ..], ..) => {
            format!("both `{first}` and `{second}` hold tensors: save the state dict of the model alone")
        }
    };
    Err(Error::unexpected(path, why))
}

fn is_tensor(value: &PickleValue) -> bool {
    matches!(value, PickleValue::Unsupported(kind) if kind == TENSOR)
}

/// Why a file was not read.
fn refused(path: &Path, error: PytorchError) -> Error {
    match error {
        PytorchError::Io(error) if error.raw_os_error().is_some() => Error::io("read", path)(error),
        PytorchError::Pickle(PickleError::UnsupportedType(kind)) => Error::unexpected(
            path,
            format!("it holds a tensor of the kind `{kind}`, which cannot be averaged: {REMEDY}"),
        ),
        other => Error::damaged(path, other),
    }
}

/// The type of an entry that is a tensor.
const TENSOR: &str = "torch.Tensor";

const REMEDY: &str = "where you trust the file, load it with PyTorch, leave that entry out and save it again";

/// An entry without code.
fn plain(path: &Path, name: &str, value: PickleValue) -> Result<Value> {
    Ok(match value {
        PickleValue::Bool(value) => Value::Bool(value),
        PickleValue::Int(value) => Value::Int(value),
        PickleValue::Dict(entries) => {
            let entry = |(key, value)| {
                let inner = plain(path, &format!("{name}.{key}"), value)?;
                Ok((key, inner))
            };
            Value::Dict(entries.into_iter().map(entry).collect::<Result<_>>()?)
        }
        PickleValue::List(values) => {
            values.into_iter().enumerate().try_for_each(|(i, v)| plain(path, &format!("{name}.{i}"), v).map(drop))?;
            Value::Other
        }
        PickleValue::Unsupported(kind) if kind != TENSOR => {
            let why = format!("`{name}` is no tensor but a Python object, `{kind}`, which is never run: {REMEDY}");
            return Err(Error::unexpected(path, why));
        }
        _ => Value::Other,
    })
}

fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U64 => Dtype::U64,
        DType::U32 => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::U8 => Dtype::U8,
        DType::Bool => Dtype::BOOL,
    }
}

/// The number in the bytes of one element; none for a whole number beyond an `i64`.
pub fn number(dtype: Dtype, bytes: &[u8]) -> Option<Number> {
    let rounded = |value: f64| Some(Number::Rounded(value, dtype));
    match dtype {
        Dtype::F64 => rounded(f64::from_le_bytes(bytes.try_into().ok()?)),
        Dtype::F32 => rounded(f32::from_le_bytes(bytes.try_into().ok()?).into()),
        Dtype::F16 => rounded(f16::from_le_bytes(bytes.try_into().ok()?).into()),
        Dtype::BF16 => rounded(bf16::from_le_bytes(bytes.try_into().ok()?).into()),
        Dtype::I64 => Some(Number::Whole(i64::from_le_bytes(bytes.try_into().ok()?))),
        Dtype::I32 => Some(Number::Whole(i32::from_le_bytes(bytes.try_into().ok()?).into())),
        Dtype::I16 => Some(Number::Whole(i16::from_le_bytes(bytes.try_into().ok()?).into())),
        Dtype::I8 => Some(Number::Whole(i8::from_le_bytes(bytes.try_into().ok()?).into())),
        Dtype::U64 => u64::from_le_bytes(bytes.try_into().ok()?).try_into().ok().map(Number::Whole),
        Dtype::U32 => Some(Number::Whole(u32::from_le_bytes(bytes.try_into().ok()?).into())),
        Dtype::U16 => Some(Number::Whole(u16::from_le_bytes(bytes.try_into().ok()?).into())),
        Dtype::U8 | Dtype::BOOL => Some(Number::Whole(u8::from_le_bytes(bytes.try_into().ok()?).into())),
        _ => None,
    }
}
