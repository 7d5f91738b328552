//! Rust types of elements.

use bytemuck::Pod;
use half::{bf16, f16};
use safetensors::Dtype;

/// Rust type of the elements of a tensor.
pub trait Element: Pod {
    /// Dtype of these elements.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),* $(,)?) => {
        $(impl Element for $rust { const DTYPE: Dtype = Dtype::$dtype; })*
    };
}
elements! {
    f32 => F32, f64 => F64, f16 => F16, bf16 => BF16,
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
}
