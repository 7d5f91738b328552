//! Scan of an average for values that are not finite and for the largest magnitude.

use rayon::prelude::*;

use super::{CHUNK, vectorised};

/// Range of a tensor's values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ValueRange {
    /// Largest magnitude, if all values are finite. Chunks with a value that is not finite count as zeros.
    pub largest: f32,
    /// Index of the first value that is NaN or infinite.
    pub first_not_finite: Option<usize>,
}

/// Returns the range of all values.
pub fn scan(values: &[f32]) -> ValueRange {
    let chunks = values.par_chunks(CHUNK).enumerate().map(|(i, chunk)| scan_chunk(i * CHUNK, chunk));
    chunks.reduce(ValueRange::default, ValueRange::union)
}

/// Copies values and returns their range, as fast as the copy alone.
pub fn copy_and_scan(dst: &mut [f32], src: &[f32]) -> ValueRange {
    assert_eq!(dst.len(), src.len(), "a copy has as many values");
    let chunks = dst.par_chunks_mut(CHUNK).zip(src.par_chunks(CHUNK)).enumerate();
    let copied = chunks.map(|(i, (dst, src))| {
        dst.copy_from_slice(src);
        scan_chunk(i * CHUNK, src)
    });
    copied.reduce(ValueRange::default, ValueRange::union)
}

/// Returns the range of a chunk that begins at element `start`.
fn scan_chunk(start: usize, chunk: &[f32]) -> ValueRange {
    // Bits of magnitudes have the order of the magnitudes, with infinity and NaN on top.
    let largest = vectorised(
        #[inline(always)]
        || chunk.iter().fold(0, |most: u32, v| most.max(v.to_bits() & 0x7fff_ffff)),
    );
    let finite = f32::from_bits(largest).is_finite();
    let first = if finite { None } else { chunk.iter().position(|v| !v.is_finite()).map(|i| start + i) };
    ValueRange { largest: if finite { f32::from_bits(largest) } else { 0.0 }, first_not_finite: first }
}

impl ValueRange {
    /// Returns the range of the values of both.
    fn union(self, other: ValueRange) -> ValueRange {
        ValueRange {
            largest: self.largest.max(other.largest),
            first_not_finite: self.first_not_finite.into_iter().chain(other.first_not_finite).min(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scan_finds_largest_and_first_not_finite_value() {
        let mut values: Vec<f32> = (0..3 * CHUNK + 11).map(|i| (i % 1000) as f32 - 600.0).collect();
        assert_eq!(scan(&values), ValueRange { largest: 600.0, first_not_finite: None });
        values[2 * CHUNK + 5] = f32::NAN;
        assert_eq!(scan(&values).first_not_finite, Some(2 * CHUNK + 5));
        values[17] = f32::NEG_INFINITY;
        assert_eq!(scan(&values).first_not_finite, Some(17));
        assert_eq!(scan(&[]), ValueRange::default());
    }

    #[test]
    fn copy_and_scan_equals_scan() {
        for len in [0, 1, 5, CHUNK - 1, CHUNK, 2 * CHUNK + 3] {
            let mut values: Vec<f32> = (0..len).map(|i| (i % 1000) as f32 - 600.0).collect();
            for bad in [None, Some(len / 2), len.checked_sub(1)] {
                bad.into_iter().for_each(|i| values.get_mut(i).into_iter().for_each(|v| *v = f32::NEG_INFINITY));
                let mut copy = vec![f32::NAN; len];
                assert_eq!(copy_and_scan(&mut copy, &values), scan(&values), "{len} {bad:?}");
                assert_eq!(copy, values);
            }
        }
    }
}
