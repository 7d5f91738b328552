//! Numbers that checkpoints store as tensors of one element.

use half::{bf16, f16};
use safetensors::Dtype;

/// Number that a checkpoint stores as a tensor of one element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// Exact integer.
    Whole(i64),
    /// Number that was rounded to this floating-point dtype.
    Rounded(f64, Dtype),
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
