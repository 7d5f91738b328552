//! What values an average holds: whether all are finite, and how large they are.

use rayon::prelude::*;

use super::{CHUNK, vectorised};

/// The range of some values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Range {
    /// The largest magnitude among the finite values.
    pub largest: f32,
    /// The first value that is NaN or infinite, by its index.
    pub first_not_finite: Option<usize>,
}

/// Looks at all values once.
pub fn scan(values: &[f32]) -> Range {
    let chunks = values.par_chunks(CHUNK).enumerate().map(|(i, chunk)| look(i * CHUNK, chunk));
    chunks.reduce(Range::default, Range::and)
}

/// Copies values and looks at them on the way: as fast as the copy alone.
pub fn copy_and_scan(dst: &mut [f32], src: &[f32]) -> Range {
    assert_eq!(dst.len(), src.len(), "a copy has as many values");
    let chunks = dst.par_chunks_mut(CHUNK).zip(src.par_chunks(CHUNK)).enumerate();
    let copied = chunks.map(|(i, (dst, src))| {
        dst.copy_from_slice(src);
        look(i * CHUNK, src)
    });
    copied.reduce(Range::default, Range::and)
}

/// The range of a chunk that begins at element `start`.
fn look(start: usize, chunk: &[f32]) -> Range {
    // Bits of magnitudes compare like the magnitudes, with infinity and NaN on top.
    let largest = vectorised(
        #[inline(always)]
        || chunk.iter().fold(0, |most: u32, v| most.max(v.to_bits() & 0x7fff_ffff)),
    );
    let finite = f32::from_bits(largest).is_finite();
    let first = if finite { None } else { chunk.iter().position(|v| !v.is_finite()).map(|i| start + i) };
    Range { largest: if finite { f32::from_bits(largest) } else { 0.0 }, first_not_finite: first }
}

impl Range {
    /// The range of both.
    fn and(self, other: Range) -> Range {
        Range {
            largest: self.largest.max(other.largest),
            first_not_finite: self.first_not_finite.into_iter().chain(other.first_not_finite).min(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_largest_and_the_first_bad_one() {
        let mut values: Vec<f32> = (0..3 * CHUNK + 11).map(|i| (i % 1000) as f32 - 600.0).collect();
        assert_eq!(scan(&values), Range { largest: 600.0, first_not_finite: None });
        values[2 * CHUNK + 5] = f32::NAN;
        assert_eq!(scan(&values).first_not_finite, Some(2 * CHUNK + 5));
        values[17] = f32::NEG_INFINITY;
        assert_eq!(scan(&values).first_not_finite, Some(17));
        assert_eq!(scan(&[]), Range::default());
    }

    #[test]
    fn a_copy_sees_what_a_scan_sees() {
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
