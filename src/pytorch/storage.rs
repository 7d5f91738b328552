//! Storages: the arrays of elements that tensors refer to.

use safetensors::Dtype;

use super::pickle::{NodeId, Pickle};

/// Reference to a storage, as PyTorch pickles it: `("storage", type, key, device, number of elements)`.
pub(super) struct StorageRef<'a> {
    /// Class of the storage, by its last name.
    pub kind: &'a str,
    pub key: &'a str,
    /// Number of elements.
    pub count: i64,
    /// Element of the stored array at which a part of it begins, and the number of elements of this part.
    pub view: Option<(i64, i64)>,
}

impl<'a> StorageRef<'a> {
    /// Reads a reference; `None` if it is of another kind.
    pub(super) fn new(pickle: &'a Pickle, id: NodeId) -> Option<StorageRef<'a>> {
        let items = pickle.items(id)?;
        let [tag, class, key, _, count, rest @ ..] = items else { return None };
        let view = rest.first().and_then(|&view| match pickle.items(view)? {
            [_, offset, count] => Some((pickle.int(*offset)?, pickle.int(*count)?)),
            _ => None,
        });
        let kind = pickle.class(*class)?.rsplit('.').next()?;
        let key = pickle.text(*key)?;
        let count = pickle.int(*count)?;
        (pickle.text(*tag)? == "storage").then_some(StorageRef { kind, key, count, view })
    }
}

/// Storage without a dtype of its own; its elements are bytes.
pub(super) const UNTYPED: &str = "UntypedStorage";

/// Storages and dtypes by the names of PyTorch. Some dtypes have no storage.
const DTYPES: [(&str, &str, Dtype); 20] = [
    ("DoubleStorage", "float64", Dtype::F64),
    ("FloatStorage", "float32", Dtype::F32),
    ("HalfStorage", "float16", Dtype::F16),
    ("BFloat16Storage", "bfloat16", Dtype::BF16),
    ("LongStorage", "int64", Dtype::I64),
    ("IntStorage", "int32", Dtype::I32),
    ("ShortStorage", "int16", Dtype::I16),
    ("CharStorage", "int8", Dtype::I8),
    ("ByteStorage", "uint8", Dtype::U8),
    ("BoolStorage", "bool", Dtype::BOOL),
    ("ComplexFloatStorage", "complex64", Dtype::C64),
    ("", "uint64", Dtype::U64),
    ("", "uint32", Dtype::U32),
    ("", "uint16", Dtype::U16),
    ("", "float8_e4m3fn", Dtype::F8_E4M3),
    ("", "float8_e5m2", Dtype::F8_E5M2),
    ("", "float8_e4m3fnuz", Dtype::F8_E4M3FNUZ),
    ("", "float8_e5m2fnuz", Dtype::F8_E5M2FNUZ),
    ("", "float8_e8m0fnu", Dtype::F8_E8M0),
    (UNTYPED, "", Dtype::U8),
];

/// Returns the dtype of a storage's elements; `None` if no safetensors file has it.
pub(super) fn dtype(kind: &str) -> Option<Dtype> {
    DTYPES.iter().find(|(storage, ..)| !kind.is_empty() && *storage == kind).map(|(_, _, dtype)| *dtype)
}

/// Returns the dtype of PyTorch's name, such as `float32`.
pub(super) fn dtype_named(name: &str) -> Option<Dtype> {
    DTYPES.iter().find(|(_, dtype, _)| !name.is_empty() && *dtype == name).map(|(_, _, dtype)| *dtype)
}

/// Returns PyTorch's name of a dtype, such as `float32`.
pub(super) fn dtype_name(dtype: Dtype) -> &'static str {
    DTYPES.iter().find(|(_, _, known)| *known == dtype).map_or("of an unknown dtype", |(_, name, _)| name)
}

/// Bytes of an element; `None` for an unknown storage.
pub(super) fn element_size(kind: &str) -> Option<usize> {
    match kind {
        "ComplexDoubleStorage" => Some(16),
        "QInt32Storage" | "ComplexHalfStorage" => Some(4),
        "QInt8Storage" | "QUInt8Storage" | "QUInt4x2Storage" | "QUInt2x4Storage" => Some(1),
        _ => dtype(kind).map(|dtype| dtype.bitsize() / 8),
    }
}
