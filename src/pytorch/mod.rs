//! PyTorch checkpoints (`.pt`): a dict of tensors and plain values.
//!
//! Code that a pickle names is never run. An entry that is a Python object is an error.

mod archive_directory;
mod guard;
mod pickle_memory;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pytorch_reader::{DType, FileFormat, PickleError, PickleValue, PytorchError, PytorchReader, Tensor};
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::tensor::TensorSpec;

/// Opened checkpoint. Its pickle is parsed; the elements of its tensors are still in the file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    values: BTreeMap<String, Value>,
}

/// Entry of a checkpoint that is not a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Bool(bool),
    Int(i64),
    Dict(BTreeMap<String, Value>),
    /// Any other plain value. None of them is used.
    Other,
}

/// Number that a checkpoint stores as a tensor of one element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// Exact integer.
    Whole(i64),
    /// Number that was rounded to this floating-point dtype.
    Rounded(f64, Dtype),
}

impl Checkpoint {
    /// Opens a checkpoint and reads everything but the elements of its tensors.
    ///
    /// # Errors
    /// - [`Error::Io`] if the file cannot be read.
    /// - [`Error::Damaged`] if it is not a complete PyTorch file.
    /// - [`Error::Unexpected`] if it is not a regular file, if it holds anything but tensors and plain values, or if
    ///   its contents would take far more memory than the file.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let (root, mut found) = parse(path)?;
        Checkpoint::from_dict(path, root, &mut found)
    }

    /// Opens a model's weights or a training checkpoint that holds them in a dict.
    ///
    /// If there is such a dict, its tensors become those of the checkpoint. The entries beside it become values, and so
    /// do tensors of one integer among them.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and [`Error::Unexpected`] if it holds several models or none.
    pub fn open_model(path: &Path) -> Result<Checkpoint> {
        let (mut root, mut found) = parse(path)?;
        let Some(key) = model_key(path, &root)? else {
            return Checkpoint::from_dict(path, root, &mut found);
        };
        let Some(PickleValue::Dict(model)) = root.remove(key) else {
            return Err(Error::unexpected(path, format!("`{key}` is not a dict of tensors")));
        };
        let mut model_tensors =
            model.keys().filter_map(|name| Some((name.clone(), found.remove(&format!("{key}.{name}"))?))).collect();
        let Checkpoint { tensors, .. } = Checkpoint::from_dict(path, model, &mut model_tensors)?;
        let mut rest = Checkpoint::from_dict(path, root, &mut found)?;
        let integers = rest.integers();
        rest.values.extend(integers);
        Ok(Checkpoint { tensors, ..rest })
    }

    /// Splits the entries of a dict into tensors and values.
    fn from_dict(
        path: &Path,
        dict: HashMap<String, PickleValue>,
        found: &mut HashMap<String, Tensor>,
    ) -> Result<Checkpoint> {
        let mut tensors = BTreeMap::new();
        let mut values = BTreeMap::new();
        for (name, value) in dict {
            match found.remove(&name) {
                Some(tensor) => drop(tensors.insert(name, tensor)),
                None => drop(values.insert(name.clone(), plain_value(path, &name, value)?)),
            }
        }
        Ok(Checkpoint { path: path.to_owned(), tensors, values })
    }

    /// Reads all tensors that hold a single integer.
    fn integers(&self) -> Vec<(String, Value)> {
        let integer = |name: &str| match self.number(name) {
            Ok(Number::Whole(value)) => Some((name.to_owned(), Value::Int(value))),
            _ => None,
        };
        self.names().filter_map(integer).collect()
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns true if there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Entries that are not tensors.
    pub fn values(&self) -> &BTreeMap<String, Value> {
        &self.values
    }

    /// Returns the name, dtype and shape of a tensor.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the tensor is missing.
    pub fn spec(&self, name: &str) -> Result<TensorSpec> {
        let tensor = self.tensor(name)?;
        Ok(TensorSpec { name: name.to_owned(), dtype: dtype(tensor.dtype()), shape: tensor.shape().to_vec() })
    }

    /// Reads the elements of a tensor in C order, little endian, whatever its strides.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`] if the file ends before them, and as [`Checkpoint::spec`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let damaged = |error: std::io::Error| match error.raw_os_error() {
            Some(_) => Error::io("read", &self.path)(error),
            None => Error::damaged(&self.path, error),
        };
        self.tensor(name)?.read().map_err(damaged)
    }

    /// Reads a tensor of one element as a number.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the tensor has more elements or none, or is not a number. Otherwise as
    /// [`Checkpoint::read`].
    pub fn number(&self, name: &str) -> Result<Number> {
        let spec = self.spec(name)?;
        if spec.shape.iter().product::<usize>() != 1 {
            let why = format!("`{name}` has the shape {:?}; a single number is expected", spec.shape);
            return Err(Error::unexpected(&self.path, why));
        }
        let bytes = self.read(name)?;
        number(spec.dtype, &bytes).ok_or_else(|| {
            Error::unexpected(&self.path, format!("`{name}` of dtype {} cannot be read as a number", spec.dtype))
        })
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::unexpected(&self.path, format!("it has no tensor `{name}`")))
    }
}

/// Parses a file into its entries and its tensors. A tensor's name is the keys that lead to it, joined by dots.
fn parse(path: &Path) -> Result<(HashMap<String, PickleValue>, HashMap<String, Tensor>)> {
    let length = guard::check_file(path)?;
    let reader = PytorchReader::new(path).map_err(|error| read_error(path, error))?;
    // The reader loads old archives into memory whole, and its other formats hold no tensors. No supported tool writes
    // either.
    if !matches!(reader.metadata().format_type, FileFormat::Zip | FileFormat::Legacy) {
        return Err(Error::damaged(path, "not a checkpoint that `torch.save` of PyTorch 1.0 or later writes"));
    }
    let root = PytorchReader::read_pickle_data(path, None).map_err(|error| read_error(path, error))?;
    let PickleValue::Dict(root) = root else {
        return Err(Error::damaged(path, "not a dict of tensors"));
    };
    let found = reader.into_tensors();
    guard::check_tensors(path, length, &root, &found)?;
    Ok((root, found))
}

/// Keys under which training checkpoints store the model.
const MODEL_KEYS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// Finds the key of the dict that holds the model. Returns `None` if its tensors are at the top level.
///
/// # Errors
/// [`Error::Unexpected`] if it holds several models or none.
fn model_key(path: &Path, root: &HashMap<String, PickleValue>) -> Result<Option<&'static str>> {
    let known: Vec<&'static str> =
        MODEL_KEYS.into_iter().filter(|key| root.get(*key).is_some_and(holds_tensors)).collect();
    let other = root.iter().filter(|(_, value)| holds_tensors(value)).map(|(key, _)| key).min();
    let why = match (known.as_slice(), root.values().any(is_tensor), other) {
        ([key], ..) => return Ok(Some(key)),
        ([], true, None) => return Ok(None),
        ([], true, Some(other)) => {
            format!("tensors are at its top level and in `{other}`: save the model's state dict alone")
        }
        ([], false, _) => {
            let known = MODEL_KEYS.join("`, `");
            format!("no tensors are at its top level, nor in `{known}`: save the model's state dict alone")
        }
        ([first, second, ..], ..) => {
            format!("both `{first}` and `{second}` hold tensors: save the model's state dict alone")
        }
    };
    Err(Error::unexpected(path, why))
}

/// Returns true for a dict with a tensor in it.
fn holds_tensors(value: &PickleValue) -> bool {
    matches!(value, PickleValue::Dict(dict) if dict.values().any(is_tensor))
}

fn is_tensor(value: &PickleValue) -> bool {
    matches!(value, PickleValue::Unsupported(kind) if kind == TENSOR)
}

/// Converts an error of the reader.
fn read_error(path: &Path, error: PytorchError) -> Error {
    match error {
        PytorchError::Io(error) if error.raw_os_error().is_some() => Error::io("read", path)(error),
        PytorchError::Pickle(PickleError::UnsupportedType(kind)) => {
            Error::unexpected(path, format!("it holds a tensor of type `{kind}`, which cannot be averaged: {REMEDY}"))
        }
        PytorchError::Pickle(PickleError::InvalidData(why)) if why.contains("memo bomb") => {
            let why = "it holds more values than the reader copies (about 33,000 tensors, or 64 MiB of repeated \
                       texts): if you trust it, load it with PyTorch and save the model's state dict alone";
            Error::unexpected(path, why)
        }
        other => Error::damaged(path, other),
    }
}

/// Type that the reader reports for an entry that is a tensor.
const TENSOR: &str = "torch.Tensor";

const REMEDY: &str = "if you trust the file, load it with PyTorch, remove that entry and save it again";

/// Converts an entry that is not a tensor.
///
/// # Errors
/// [`Error::Unexpected`] if it is or contains a Python object.
fn plain_value(path: &Path, name: &str, value: PickleValue) -> Result<Value> {
    plain(value).map_err(|object| {
        let inner = object.keys.iter().rev().map(|key| format!(".{key}")).collect::<String>();
        let kind = object.kind;
        let why = format!("`{name}{inner}` is a Python object (`{kind}`), whose code is never run: {REMEDY}");
        Error::unexpected(path, why)
    })
}

/// Python object in an entry, with the keys that lead to it, innermost first.
struct PythonObject {
    kind: String,
    keys: Vec<String>,
}

/// Converts a value. Only an object that is found gets a name, since long keys of nested dicts would fill the memory.
fn plain(value: PickleValue) -> std::result::Result<Value, PythonObject> {
    let within = |key: String, mut object: PythonObject| {
        object.keys.push(key);
        object
    };
    Ok(match value {
        PickleValue::Bool(value) => Value::Bool(value),
        PickleValue::Int(value) => Value::Int(value),
        PickleValue::Dict(entries) => {
            let mut dict = BTreeMap::new();
            for (key, value) in entries {
                match plain(value) {
                    Ok(value) => drop(dict.insert(key, value)),
                    Err(object) => return Err(within(key, object)),
                }
            }
            Value::Dict(dict)
        }
        PickleValue::List(values) => {
            for (i, value) in values.into_iter().enumerate() {
                plain(value).map_err(|object| within(i.to_string(), object))?;
            }
            Value::Other
        }
        PickleValue::Unsupported(kind) if kind != TENSOR => return Err(PythonObject { kind, keys: Vec::new() }),
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

/// Reads the bytes of one element as a number. Returns `None` for an integer beyond `i64` and for other dtypes.
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
