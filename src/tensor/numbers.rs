//! Elements of tensors as numbers.

use half::{bf16, f16};
use safetensors::Dtype;

/// Converts elements to f64; `None` for a dtype that is neither of floating point nor an integer.
///
/// Integers beyond 2^53 are rounded.
pub(crate) fn to_f64(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f64>> {
    Some(match dtype {
        Dtype::F64 => convert(bytes, f64::from_le_bytes),
        Dtype::F32 => convert(bytes, |b| f32::from_le_bytes(b).into()),
        Dtype::F16 => convert(bytes, |b| f16::from_le_bytes(b).into()),
        Dtype::BF16 => convert(bytes, |b| bf16::from_le_bytes(b).into()),
        Dtype::I64 => convert(bytes, |b| i64::from_le_bytes(b) as f64),
        Dtype::I32 => convert(bytes, |b| i32::from_le_bytes(b).into()),
        Dtype::I16 => convert(bytes, |b| i16::from_le_bytes(b).into()),
        Dtype::I8 => convert(bytes, |b| i8::from_le_bytes(b).into()),
        Dtype::U8 => convert(bytes, |b: [u8; 1]| b[0].into()),
        _ => return None,
    })
}

fn convert<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    bytes.as_chunks::<N>().0.iter().map(|&element| number(element)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_of_each_dtype_are_their_numbers() {
        for value in [1.5, -2.0, 0.0] {
            let found = [
                to_f64(Dtype::F64, &f64::to_le_bytes(value)),
                to_f64(Dtype::F32, &(value as f32).to_le_bytes()),
                to_f64(Dtype::F16, &f16::from_f64(value).to_le_bytes()),
                to_f64(Dtype::BF16, &bf16::from_f64(value).to_le_bytes()),
            ];
            assert!(found.iter().all(|found| *found == Some(vec![value])), "{found:?}");
        }
        let integers = [
            to_f64(Dtype::I64, &(-3i64).to_le_bytes()),
            to_f64(Dtype::I32, &(-3i32).to_le_bytes()),
            to_f64(Dtype::I16, &(-3i16).to_le_bytes()),
            to_f64(Dtype::I8, &(-3i8).to_le_bytes()),
        ];
        assert!(integers.iter().all(|found| *found == Some(vec![-3.0])), "{integers:?}");
        assert_eq!(to_f64(Dtype::U8, &[3, 200]), Some(vec![3.0, 200.0]));
        assert_eq!(to_f64(Dtype::BOOL, &[1]), None);
    }
}
